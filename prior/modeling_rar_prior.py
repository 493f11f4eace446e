"""The randomized autoregressive prior: single tokens in any order, each position told which one is predicted next.

RAR: Yu et al. 2024, arXiv:2411.00776. The sequence is [cls, class, x_1 … x_{L−1}], x_j the j-th token in the order of
the prediction; its output at the class predicts x_1. Legend: B batch, R rows, L all tokens, V codes, D width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel  # noqa: F401  diffusers asks a component's module for this name.
from transformers import initialization as init

from nextblock.data.blocks import BlockLayout
from nextblock.files.stored_model import StoredModel
from nextblock.training.precision import outside_autocast

from .attention import causal_attention
from .conditioning import ClassCondition, ClassConditions, Context
from .configuration_rar_prior import RARPriorConfig
from .generation import BlockStep
from .head_plan import configured_plan
from .heads import TokenEmbedding, build_head, head_scores, output_projection
from .layers import LayerStack
from .linear import weights_used
from .losses import IGNORED_LABEL, PriorOutput
from .model_calls import as_labels, check_loss_options, check_teacher_input, predicted, sample_blocks
from .orders import check_orders, in_block_order, in_order
from .rar_layers import Modulation, RARCache, RARHeadNorm, RARLayer

# Modulations are computed ahead for so many positions that their weights are read once for about this many rows.
MODULATED_ROWS = 64


class RARPrior(StoredModel):
    """Predict tokens one by one, in raster or any other order, from a class and the tokens before.

    Args:
        config: the architecture.
    """

    config_class = RARPriorConfig
    base_model_prefix = "prior"
    main_input_name = "var_input"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RARLayer"]
    step_modules = ("LayerStack",)
    _input_embed_layer = "embeddings"
    # As published: of the modulations, those of the layers are decayed and the head's is not.
    no_decay = (
        *("embeddings", "class_emb", "pos_embed", "target_aware_pos_embed", "timesteps_embeddings"),
        "adaln_before_head",
    )
    can_chunk_loss, takes_orders, takes_indices = True, True, True
    embedding_dim = 0
    fitted_to_data = ("class_emb",)

    def __init__(self, config: RARPriorConfig):
        super().__init__(config)
        D, V, plan = config.hidden_size, config.vocab_size, configured_plan(config)
        self.layout: BlockLayout = config.block_layout()
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        # One more than there are codes: published tables have a row for masked tokens, which nothing reads.
        self.embeddings = nn.Embedding(V + 1, D) if config.head == "softmax" else TokenEmbedding(plan.bases, D)
        self.class_emb = nn.Embedding(config.num_classes + 1, D)
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_position_rows, D))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, config.num_position_rows, D))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, config.num_step_rows, D))
        self.blocks = LayerStack(RARLayer(config) for _ in range(config.num_layers))
        self.adaln_before_head = RARHeadNorm(config)
        self.head_plan, self.lm_head = plan, build_head(config, D)
        self.post_init()

    @property
    def conditions(self) -> ClassConditions:
        """The classes of the configuration."""
        return ClassConditions(self.config.num_classes, self.config.class_names)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as RAR does: layers begin as the identity."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.trunc_normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RARPrior):
            for table in (self.cls_token, self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
                init.trunc_normal_(table, std=0.02)
            # Not in a branch of their own: transformers passes over modules that hold no parameter directly.
            for modulated in (*self.blocks, self.adaln_before_head):
                init.zeros_(modulated.adaLN_modulation[1].weight)

    def forward(
        self,
        var_input: Tensor,
        class_labels: Tensor | ClassCondition,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        loss_chunk_size: int | None = None,
        orders: Tensor | None = None,
        known_digits: Tensor | None = None,
    ) -> PriorOutput | tuple:
        """Predict all tokens under teacher forcing.

        Args:
            var_input: (B, L − 1) int64, all tokens but the last in block order; with orders also (B, L), all of them.
            class_labels: (B,) int64 in [0, num_classes]; num_classes is the null class. Or a condition of such labels.
            labels: (B, L) int64 indices to predict, in block order, −100 for those to ignore; gives the loss. With
                orders they also give the last token in block order where `var_input` lacks it.
            return_dict: False returns a tuple of what is not None.
            loss_chunk_size: compute the loss this many tokens at a time and return no logits; needs labels.
            orders: (B, L) int64, in every row a permutation of the tokens: orders[b, j] is predicted j-th, from those
                before it. None is block order. What goes in and what comes out stays in block order.
            known_digits: (B, L, n) bool, see `head_losses.head_output`.

        Returns:
            A `PriorOutput`: logits[b, i] are those of token i, predicted when its turn came.

        Raises:
            ValueError: if a shape, dtype or label does not fit the configuration, there are chunks but no labels, or
                orders are no permutations.
        """
        check_loss_options(labels, loss_chunk_size)
        condition = self.conditions.of(class_labels, reads_range=not self.training or var_input.device.type == "cpu")
        tokens = self._ordered_input(var_input, len(condition), labels, orders)
        vector = self.class_emb(condition.class_labels)
        hidden_states = self._input(vector, tokens, orders)
        # Published: the number of the position, whichever token is predicted there.
        modulator = vector[:, None] + self.timesteps_embeddings[:, : hidden_states.shape[1]]
        dropout = self.config.attention_dropout if self.training else 0.0
        attend = partial(causal_attention, scale=self.blocks[0].attn.scale, dropout=dropout)
        for layer in self.blocks:
            # Its modulation is its own affair: where weights are sharded, they are there in its forward pass alone.
            hidden_states = layer(hidden_states, modulator, attend)
        hidden_states = self._head_input(hidden_states[:, 1:], self.adaln_before_head.modulation(modulator[:, 1:]))
        hidden_states = in_block_order(hidden_states, orders)
        return predicted(self, self.lm_head, hidden_states, labels, return_dict, loss_chunk_size, known_digits)

    def _ordered_input(self, var_input: Tensor, B: int, labels: Tensor | None, orders: Tensor | None) -> Tensor:
        """Check what a forward pass is given; return the tokens that are inputs, (B, L − 1) in their order."""
        L = self.layout.num_tokens
        if orders is None:
            check_teacher_input(self, var_input, B, labels)
            return var_input
        check_orders(orders, B, L)
        if isinstance(var_input, Tensor) and tuple(var_input.shape) == (B, L):
            check_teacher_input(self, var_input[:, 1:], B, labels)
            check_teacher_input(self, var_input[:, :-1], B, None)
            return in_order(var_input, orders[:, :-1])
        check_teacher_input(self, var_input, B, labels)
        if labels is None:
            raise ValueError(f"var_input has shape {(B, L - 1)} and orders are given; expected {(B, L)}, or labels")
        last = labels[:, -1:]
        is_ignored = last[:, 0] == IGNORED_LABEL
        if labels.device.type == "cpu" and (is_ignored & (orders[:, -1] != L - 1)).any():
            raise ValueError(f"labels[:, -1] holds {IGNORED_LABEL}; expected codes, or var_input of shape {(B, L)}")
        return in_order(torch.cat([var_input, last.clamp_min(0)], dim=1), orders[:, :-1])

    def _input(self, class_vector: Tensor, tokens: Tensor, orders: Tensor | None) -> Tensor:
        """Return the sequence (B, L + 1, D) of cls, class and tokens (B, L − 1), with what is added to each."""
        L = self.layout.num_tokens
        classes_and_tokens = torch.cat([class_vector[:, None], self.embeddings(tokens)], dim=1)
        if orders is None:
            at, to = self.pos_embed[:, 1 : L + 1], self.target_aware_pos_embed[:, 2 : L + 2]
        else:
            # The class has the row before those of the tokens.
            at = F.embedding(F.pad(orders[:, :-1] + 2, (1, 0), value=1), self.pos_embed[0])
            to = F.embedding(orders + 2, self.target_aware_pos_embed[0])
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(class_vector), -1, -1)
        return torch.cat([first, classes_and_tokens + (at + to).to(classes_and_tokens.dtype)], dim=1)

    def _head_input(self, hidden_states: Tensor, modulation: Modulation) -> Tensor:
        """Return what the output projection takes, normalised in the model's precision and not in autocast's."""
        # Sharded weights come in the run's half type, while hidden states are float32.
        dtype = torch.promote_types(output_projection(self.lm_head).weight.dtype, hidden_states.dtype)
        with outside_autocast(hidden_states.device):
            return self.adaln_before_head(hidden_states.to(dtype), tuple(part.to(dtype) for part in modulation))

    def context(self, condition: ClassCondition, orders: Tensor | None = None) -> Context:
        """Embed the class; orders (R, L), in which tokens are predicted, go with it."""
        return Context(vector=self.class_emb(condition.class_labels), orders=orders)

    def new_cache(self, num_rows: int) -> RARCache:
        """Allocate keys and values of all layers and L + 1 positions."""
        num_heads, D = self.config.num_heads, self.config.hidden_size
        shape = (num_rows, num_heads, self.layout.num_tokens + 1, D // num_heads)
        return RARCache(self.config.num_layers, shape, self.cls_token.dtype, self.cls_token.device)

    def decode_block(self, content: Tensor | None, k: int, context: Context, cache: RARCache) -> Tensor:
        """Run the position that predicts token k in the order, with the head's norm; see `family.Prior`."""
        R = len(context)
        if content is None:
            self._run_position((self.cls_token + self.pos_embed[:, :1]).repeat(R, 1, 1), 0, context, cache)
            token = context.vector[:, None]
        else:
            # Unconditional rows see the same tokens as the conditional ones.
            token = self.embeddings(content).repeat(R // len(content), 1, 1)
        orders = context.orders
        if orders is None:
            at, to = self.pos_embed[:, k + 1 : k + 2], self.target_aware_pos_embed[:, k + 2 : k + 3]
        else:
            at = F.embedding(orders[:, k - 1 : k] + 2, self.pos_embed[0]) if k else self.pos_embed[:, 1:2]
            to = F.embedding(orders[:, k : k + 1] + 2, self.target_aware_pos_embed[0])
        return self._run_position(token + (at + to), k + 1, context, cache)

    def _run_position(self, x: Tensor, position: int, context: Context, cache: RARCache) -> Tensor:
        """Run one position (R, 1, D) through all layers and the head's norm."""
        R = len(context)
        if position == 0 or position >= cache.first + cache.modulations[0].shape[1]:
            self._modulate_ahead(position, context.vector, cache)
        *modulations, of_head = cache.of_position(position, R)
        places = torch.full((1,), position, device=x.device)
        x = self.blocks(x, tuple(modulations), cache, (0, position, position + 1), places)
        return self._head_input(x, of_head)

    def _modulate_ahead(self, position: int, vector: Tensor, cache: RARCache) -> None:
        """Compute the modulations of this position and those after it, which depend on class and number alone."""
        length = self.layout.num_tokens + 1
        num_positions = min(max(MODULATED_ROWS // len(vector), 1), length)
        # Always as many: a compiled step tells tensors by their strides.
        first = min(position, length - num_positions)
        condition = F.silu(vector[:, None] + self.timesteps_embeddings[:, first : first + num_positions])
        projections = [modulated.adaLN_modulation[1] for modulated in (*self.blocks, self.adaln_before_head)]
        with weights_used(num_uses=-(-length // num_positions)):
            cache.modulations = [each(condition).unflatten(-1, (-1, vector.shape[-1])) for each in projections]
        # Scales become factors: of six parts the second and the fifth, of the head's two the first.
        *of_layers, of_head = cache.modulations
        for parts in [each[:, :, 1::3] for each in of_layers] + [of_head[:, :, :1]]:
            parts += 1
        cache.first = first

    def logits(self, hidden_states: Tensor, context: Context, digits: Tensor | None = None) -> Tensor:
        """Return scores, (R, 1, D) → (R, 1, S), in float32; see `family.Prior`."""
        return head_scores(self.lm_head, hidden_states, digits)

    def generate(
        self,
        class_labels: Tensor,
        quantizer: nn.Module,
        *,
        generator: Generator | list[Generator] | None = None,
        given_idx_Bl: list[Tensor] | None = None,
        on_block_end: Callable[[BlockStep], None] | None = None,
        is_guidance_fixed: bool = True,
        **options,
    ) -> list[Tensor]:
        """Sample the indices of a batch of images, token by token.

        Args:
            class_labels: (B,) int64 in [0, num_classes]; num_classes is the null class.
            quantizer: the tokenizer's quantizer.
            generator: one for all images, or a list with one for each.
            given_idx_Bl: L tensors (B, 1) int64 of tokens that are already known, −1 for those to sample. Known tokens
                come first, so that all others see them. None samples all.
            on_block_end: receives each token's `BlockStep`, and may change it.
            is_guidance_fixed: whether `on_block_end` leaves the guidance alone; costs nothing where it does.
            options: fields of `SamplingOptions`, `order` among them.

        Returns:
            L tensors (B, 1) int64 in block order.

        Raises:
            ValueError: if an argument is outside its range or the quantizer does not fit.
        """
        return sample_blocks(
            self,
            self.conditions.of(as_labels(class_labels)),
            quantizer,
            options,
            generator=generator,
            given_idx_Bl=given_idx_Bl,
            on_block_end=on_block_end,
            is_guidance_fixed=is_guidance_fixed,
        )
