"""The Llama prior: next-token prediction with a class or a text in front, as in LlamaGen (arXiv:2406.06525).

Legend: B batch, R rows, L tokens, P prefix positions, V codes, D width, E width of text features.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel  # noqa: F401  diffusers asks a component's module for this name.
from transformers import initialization as init

from nextblock.data.blocks import BlockLayout
from nextblock.files.stored_model import StoredModel

from .attention import causal_attention, causal_bias
from .causal_layers import CausalStack
from .conditioning import ClassCondition, ClassConditions, Condition, Context
from .configuration_llama_prior import LlamaPriorConfig
from .generation import BlockStep
from .head_plan import configured_plan
from .heads import build_head, build_token_embedding, head_scores, output_projection
from .layers import KeyValueCache
from .llama_layers import CaptionEmbedding, ClassEmbedding, LlamaLayer, RMSNorm
from .losses import PriorOutput
from .model_calls import (
    as_labels,
    check_loss_options,
    check_teacher_input,
    predicted,
    read_condition,
    sample_blocks,
)
from .orders import refuse_orders
from .rotary import grid_rotation
from .text_condition import TextCondition, TextConditions

# As in the publication; the head starts at zero.
_INIT_STD = 0.02


class LlamaPrior(StoredModel):
    """Predict indices one by one, in raster order, from a class or a text and the indices before.

    Args:
        config: the architecture.
    """

    config_class = LlamaPriorConfig
    base_model_prefix = "prior"
    main_input_name = "var_input"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaLayer"]
    step_modules = ("CausalStack",)
    _input_embed_layer = "tok_embeddings"
    no_decay = ()
    can_chunk_loss = True
    takes_indices = True
    embedding_dim = 0
    fitted_to_data = ("cls_embedding",)

    def __init__(self, config: LlamaPriorConfig):
        super().__init__(config)
        D = config.hidden_size
        self.layout: BlockLayout = config.block_layout()
        if config.text_dim is None:
            self.cls_embedding = ClassEmbedding(config.num_classes + 1, D)
        else:
            self.cls_embedding = CaptionEmbedding(config.text_dim, config.max_text_positions, D)
        self.tok_embeddings = build_token_embedding(config, D)
        self.tok_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = CausalStack(
            LlamaLayer(config, drop_path=config.drop_path * i / max(config.num_layers - 1, 1))
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm(D, config.norm_eps)
        self.head_plan = configured_plan(config)
        self.output = build_head(config, D, has_bias=False)
        self.post_init()

    @property
    def conditions(self) -> ClassConditions | TextConditions:
        """The classes of the configuration, or texts."""
        config = self.config
        if config.text_dim is None:
            return ClassConditions(config.num_classes, config.class_names)
        return TextConditions(text_dim=config.text_dim, max_positions=config.max_text_positions)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def num_prefix(self) -> int:
        """P: the class, or the most positions of a text."""
        return 1 if self.config.text_dim is None else self.config.max_text_positions

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as published: all maps and tables alike, the head at zero."""
        # Of a network for digits alone.
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)
        if module is output_projection(self.output):
            init.zeros_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=_INIT_STD)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, CaptionEmbedding):
            init.normal_(module.uncond_embedding, std=module.uncond_embedding.shape[1] ** -0.5)

    def forward(
        self,
        var_input: Tensor,
        class_labels: Tensor | Condition | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        loss_chunk_size: int | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        orders: None = None,
        known_digits: Tensor | None = None,
    ) -> PriorOutput | tuple:
        """Predict all tokens under teacher forcing.

        Args:
            var_input: (B, L − 1) int64, all indices but the last.
            class_labels: (B,) int64 in [0, num_classes]; num_classes is the null class. Or a condition.
            labels: (B, L) int64 indices to predict, −100 for those to ignore; gives the loss.
            return_dict: False returns a tuple of what is not None.
            loss_chunk_size: compute the loss this many tokens at a time and return no logits; needs labels. None
                computes all at once.
            text_embeds: (B, T, E) text features in place of labels, of a prior that is conditioned on text.
            text_mask: (B, T) which of them are valid; None says all.
            orders: None alone: tokens come in raster order.
            known_digits: (B, L, n) bool, see `head_losses.head_output`.

        Returns:
            A `PriorOutput`.

        Raises:
            ValueError: if a shape, dtype or label does not fit the configuration, or there are chunks but no labels.
        """
        refuse_orders(self, orders)
        check_loss_options(labels, loss_chunk_size)
        # Reading the range would make every GPU training step wait for the device.
        reads_range = not self.training or var_input.device.type == "cpu"
        condition = read_condition(self, class_labels, text_embeds, text_mask, reads_range=reads_range)
        check_teacher_input(self, var_input, len(condition), labels)
        context = self.context(condition)
        P = context.prefix.shape[1]
        x = self.tok_dropout(torch.cat([context.prefix, self.tok_embeddings(var_input)], dim=1))
        first, length, bias = self.num_prefix - P, x.shape[1], None
        if context.prefix_mask is not None:
            mask = torch.cat([context.prefix_mask, context.prefix_mask.new_ones(len(x), length - P)], dim=1)
            bias = causal_bias(torch.arange(length, device=x.device), length, mask, x.dtype)
        rotation = self._rotation(x)[:, first : first + length]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal_attention(q, k, v, self.layers[0].scale, bias)

        for layer in self.layers:
            x = layer(x, rotation, attend)
        hidden_states = self.norm(x[:, P - 1 :])
        return predicted(self, self.output, hidden_states, labels, return_dict, loss_chunk_size, known_digits)

    def context(self, condition: ClassCondition | TextCondition) -> Context:
        """Embed the condition as the positions before the first token."""
        if isinstance(condition, ClassCondition):
            return Context(prefix=self.cls_embedding(condition.class_labels))
        mask = None if condition.is_whole else condition.text_mask
        return Context(prefix=self.cls_embedding(condition), prefix_mask=mask)

    def new_cache(self, num_rows: int) -> KeyValueCache:
        """Allocate keys and values of all layers, P prefix positions and L tokens."""
        config, length = self.config, self.num_prefix + self.layout.num_tokens
        shape = (num_rows, config.key_value_heads, length, config.hidden_size // config.num_heads)
        weight = self.norm.weight
        return KeyValueCache(config.num_layers, shape, weight.dtype, weight.device)

    def decode_block(self, content: Tensor | None, k: int, context: Context, cache: KeyValueCache) -> Tensor:
        """Run the prefix, or token k − 1; see `family.Prior`."""
        P = self.num_prefix
        first = P - context.prefix.shape[1]
        if content is None:
            x, start = context.prefix, first
        else:
            # Unconditional rows see the same tokens as the conditional ones.
            x, start = self.tok_embeddings(content).repeat(len(context) // len(content), 1, 1), P + k - 1
        end = start + x.shape[1]
        positions = self.layout.made_once(
            ("prefix and token positions", P), x.device, lambda: torch.arange(P + self.layout.num_tokens)
        )[start:end]
        rotation = self._rotation(x)[:, start:end]
        return self.layers(x, rotation, cache, (first, start, end), positions, context.prefix_mask)[:, -1:]

    def logits(self, hidden_states: Tensor, context: Context, digits: Tensor | None = None) -> Tensor:
        """Return scores, (R, l, D) → (R, l, S), in float32; see `family.Prior`."""
        return head_scores(self.output, self.norm(hidden_states), digits)

    def _rotation(self, x: Tensor) -> Tensor:
        """Return cosines and sines of all P + L positions."""
        config, dtype = self.config, torch.promote_types(x.dtype, torch.float32)
        width = config.hidden_size // config.num_heads
        return grid_rotation(self.layout, self.num_prefix, width, config.rope_base, x.device, dtype)

    def generate(
        self,
        class_labels: Tensor | Condition | None = None,
        quantizer: nn.Module | None = None,
        *,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        generator: Generator | list[Generator] | None = None,
        given_idx_Bl: list[Tensor] | None = None,
        on_block_end: Callable[[BlockStep], None] | None = None,
        is_guidance_fixed: bool = True,
        **options,
    ) -> list[Tensor]:
        """Sample the indices of a batch of images, one by one.

        Args:
            class_labels: see `forward`, as for the text.
            quantizer: the tokenizer's quantizer.
            text_embeds, text_mask: see `forward`.
            generator, given_idx_Bl, on_block_end, is_guidance_fixed: see `model_calls.sample_blocks`.
            options: fields of `SamplingOptions`.

        Returns:
            L tensors (B, 1) int64, fewer if `on_block_end` stops.

        Raises:
            ValueError: if an argument is outside its range or the quantizer does not fit.
        """
        if self.config.text_dim is None and not isinstance(class_labels, ClassCondition) and text_embeds is None:
            class_labels = as_labels(class_labels)
        return sample_blocks(
            self,
            read_condition(self, class_labels, text_embeds, text_mask, reads_range=True),
            quantizer,
            options,
            generator=generator,
            given_idx_Bl=given_idx_Bl,
            on_block_end=on_block_end,
            is_guidance_fixed=is_guidance_fixed,
        )
