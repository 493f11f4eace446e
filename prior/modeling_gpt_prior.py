"""The GPT prior: next-token prediction as in taming-transformers (Esser et al. 2021, arXiv:2012.09841).

A class is a code's row, in front of the tokens; a start token stands there in an unconditional model. No row says "no
class", so there is no guidance. Legend: B batch, R rows, L tokens, l positions, V codes, D width.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel  # noqa: F401  diffusers asks a component's module for this name.
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from nextblock.data.blocks import BlockLayout
from nextblock.files.stored_model import StoredModel

from .attention import causal_attention
from .causal_layers import CausalStack
from .conditioning import ClassCondition, ClassConditions, Context
from .configuration_gpt_prior import GPTPriorConfig
from .generation import BlockStep
from .head_plan import configured_plan
from .heads import build_head, build_token_embedding, head_scores
from .layers import KeyValueCache, LayerNorm
from .linear import Linear
from .losses import PriorOutput
from .model_calls import as_labels, check_loss_options, check_teacher_input, predicted, sample_blocks
from .orders import refuse_orders

# As published.
_INIT_STD = 0.02


class GPTAttention(nn.Module):
    """Multi-head attention with biases.

    Args:
        hidden_size: D.
        num_heads: heads.
        dropout: probability after the output projection.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.key = Linear(hidden_size, hidden_size)
        self.query = Linear(hidden_size, hidden_size)
        self.value = Linear(hidden_size, hidden_size)
        self.proj = Linear(hidden_size, hidden_size)
        self.resid_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend) -> Tensor:
        """Attend by a function of queries, keys and values (B, heads, l, head width)."""
        maps = (self.query, self.key, self.value)
        q, k, v = (each(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in maps)
        return self.resid_drop(self.proj(attend(q, k, v).transpose(1, 2).flatten(2)))


class GPTLayer(GradientCheckpointingLayer):
    """Attention and feed-forward (GELU), each behind a layer norm and added to its input."""

    def __init__(self, config: GPTPriorConfig):
        super().__init__()
        D = config.hidden_size
        self.scale = 1 / math.sqrt(D // config.num_heads)
        self.ln1 = LayerNorm(D, eps=config.norm_eps)
        self.ln2 = LayerNorm(D, eps=config.norm_eps)
        self.attn = GPTAttention(D, config.num_heads, config.dropout)
        self.mlp = nn.Sequential(
            Linear(D, config.feed_forward_size),
            nn.GELU(),
            Linear(config.feed_forward_size, D),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor, _: None, attend) -> Tensor:
        """Apply the layer to (B, l, D); see `CausalStack`."""
        x = x + self.attn(self.ln1(x), attend)
        return x + self.mlp(self.ln2(x))


class GPTPrior(StoredModel):
    """Predict indices one by one, in raster order, from a class or nothing and the indices before.

    Args:
        config: the architecture.
    """

    config_class = GPTPriorConfig
    base_model_prefix = "prior"
    main_input_name = "var_input"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTLayer"]
    step_modules = ("CausalStack",)
    _input_embed_layer = "tok_emb"
    # As published: matrices of linear maps alone are decayed.
    no_decay = ("tok_emb", "pos_emb")
    can_chunk_loss = True
    takes_indices = True
    embedding_dim = 0

    def __init__(self, config: GPTPriorConfig):
        super().__init__(config)
        D = config.hidden_size
        self.layout: BlockLayout = config.block_layout()
        self.tok_emb = build_token_embedding(config, D)
        self.pos_emb = nn.Parameter(torch.empty(1, config.num_positions or self.layout.num_tokens, D))
        self.drop = nn.Dropout(config.embedding_dropout)
        self.blocks = CausalStack(GPTLayer(config) for _ in range(config.num_layers))
        self.ln_f = LayerNorm(D, eps=config.norm_eps)
        self.head_plan = configured_plan(config)
        self.head = build_head(config, D, has_bias=False)
        self.post_init()

    @property
    def conditions(self) -> ClassConditions:
        """The classes of the configuration, none of which says nothing."""
        return ClassConditions(self.config.num_classes, self.config.class_names, has_null_class=False)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as published."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=_INIT_STD)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, GPTPrior):
            init.zeros_(module.pos_emb)

    def forward(
        self,
        var_input: Tensor,
        class_labels: Tensor | ClassCondition,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        loss_chunk_size: int | None = None,
        orders: None = None,
        known_digits: Tensor | None = None,
    ) -> PriorOutput | tuple:
        """Predict all tokens under teacher forcing.

        Args:
            var_input: (B, L − 1) int64, all indices but the last.
            class_labels: (B,) int64 in [0, num_classes), 0 for an unconditional model. Or a condition of such labels.
            labels: (B, L) int64 indices to predict, −100 for those to ignore; gives the loss.
            return_dict: False returns a tuple of what is not None.
            loss_chunk_size: compute the loss this many tokens at a time and return no logits; needs labels. None
                computes all at once.
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
        condition = self.conditions.of(class_labels, reads_range=not self.training or var_input.device.type == "cpu")
        check_teacher_input(self, var_input, len(condition), labels)
        x = torch.cat([self.context(condition).prefix, self.tok_emb(var_input)], dim=1)
        x = self.drop(x + self.pos_emb[:, : x.shape[1]])
        scale = self.blocks[0].scale
        dropout = self.config.attention_dropout if self.training else 0.0

        attend = partial(causal_attention, scale=scale, dropout=dropout)
        for layer in self.blocks:
            x = layer(x, None, attend)
        return predicted(self, self.head, self.ln_f(x), labels, return_dict, loss_chunk_size, known_digits)

    def context(self, condition: ClassCondition) -> Context:
        """Embed the class, or the start token, as the position before the first token."""
        start = condition.class_labels if self.config.num_classes else condition.class_labels + self.config.start_token
        return Context(prefix=self.tok_emb(start)[:, None])

    def new_cache(self, num_rows: int) -> KeyValueCache:
        """Allocate keys and values of all layers and positions."""
        config = self.config
        shape = (num_rows, config.num_heads, self.layout.num_tokens, config.hidden_size // config.num_heads)
        return KeyValueCache(config.num_layers, shape, self.pos_emb.dtype, self.pos_emb.device)

    def decode_block(self, content: Tensor | None, k: int, context: Context, cache: KeyValueCache) -> Tensor:
        """Run the class, or token k − 1; see `family.Prior`."""
        x = context.prefix if content is None else self.tok_emb(content)
        # Rows share tokens.
        x = x.repeat(len(context) // len(x), 1, 1) + self.pos_emb[:, k : k + 1]
        positions = self.layout.positions(x.device)[k : k + 1]
        return self.blocks(x, None, cache, (0, k, k + 1), positions, None)

    def logits(self, hidden_states: Tensor, context: Context, digits: Tensor | None = None) -> Tensor:
        """Return scores, (R, l, D) → (R, l, S), in float32; see `family.Prior`."""
        return head_scores(self.head, self.ln_f(hidden_states), digits)

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
        """Sample the indices of a batch of images, one by one.

        Args:
            class_labels: (B,) int64, see `forward`.
            quantizer: the tokenizer's quantizer.
            generator, given_idx_Bl, on_block_end, is_guidance_fixed: see `model_calls.sample_blocks`.
            options: fields of `SamplingOptions`; guidance is none.

        Returns:
            L tensors (B, 1) int64, fewer if `on_block_end` stops.

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
