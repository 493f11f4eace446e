"""The block-autoregressive prior: a transformer over blocks of codebook indices, conditioned on classes or texts.

VAR (Tian et al. 2024, arXiv:2404.02905) for scales; next-token, next-row and next-patch prediction for tiles.
Legend: B batch, K blocks, L_k tokens of block k, L all tokens, V codes, C code channels, D width.
"""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel  # noqa: F401  diffusers asks a component's module for this name.
from transformers import initialization as init

from nextblock.data.blocks import BlockLayout
from nextblock.files.stored_model import StoredModel
from nextblock.training.precision import outside_autocast

from .attention import block_causal_attention, prefixed_attention
from .conditioning import ClassCondition, ClassConditions, Condition, Context
from .configuration_block_prior import BlockPriorConfig
from .generation import BlockStep
from .head_plan import HeadOptions, configured_plan
from .heads import build_head, build_token_embedding, head_scores, output_projection
from .layers import BlockAttention, KeyValueCache, LayerStack, ModulatedHead, PriorLayer
from .linear import Linear
from .losses import PriorOutput
from .model_calls import as_labels, check_loss_options, check_teacher_input, predicted, read_condition, sample_blocks
from .orders import refuse_orders
from .text_condition import TextCondition, TextConditions
from .text_embedder import TextEmbedder


class BlockPrior(StoredModel):
    """Predict every block of indices, all its tokens at once, from a class and the blocks before.

    Args:
        config: the architecture.
    """

    config_class = BlockPriorConfig
    base_model_prefix = "prior"
    main_input_name = "var_input"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PriorLayer"]
    step_modules = ("LayerStack",)
    _input_embed_layer = "word_embed"
    # As in VAR; matrices among them would be decayed otherwise.
    no_decay = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul_1H11")
    can_chunk_loss = True
    fitted_to_data = ("class_emb",)

    def __init__(self, config: BlockPriorConfig):
        super().__init__(config)
        D = config.hidden_size
        self.layout: BlockLayout = config.block_layout()
        if config.text_dim is None:
            self.class_emb = nn.Embedding(config.num_classes + 1, D)
        else:
            self.text_emb = TextEmbedder(
                config.text_dim,
                D,
                has_prefix=config.has_text_prefix,
                has_vector=config.has_text_vector,
                num_empty_positions=config.num_empty_positions,
            )
        if config.input_embedding == "tokens":
            self.word_embed = build_token_embedding(config, D)
        else:
            self.word_embed = Linear(config.embedding_dim, D)
        self.pos_start = nn.Parameter(torch.empty(1, self.layout.block_lengths[0], D))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.layout.num_tokens, D))
        self.lvl_embed = nn.Embedding(self.layout.num_blocks, D)
        if config.use_shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), Linear(D, 6 * D))
        self.blocks = LayerStack(
            PriorLayer(
                D,
                config.num_heads,
                round(D * config.mlp_ratio),
                use_shared_adaln=config.use_shared_adaln,
                use_normalized_attention=config.use_normalized_attention,
                attention_scale=config.attention_scale,
                norm_eps=config.norm_eps,
                dropout=config.dropout,
                drop_path=config.drop_path * i / max(config.num_layers - 1, 1),
            )
            for i in range(config.num_layers)
        )
        self.head_nm = ModulatedHead(D, config.norm_eps)
        self.head_plan = configured_plan(config)
        self.head = build_head(config, D)
        self.post_init()

    @staticmethod
    def as_fingerprinted(options: dict, state: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        """Leave out fields of the head at their defaults: what was saved before there were any keeps its hash."""
        defaults = HeadOptions()._asdict()
        return {n: value for n, value in options.items() if defaults.get(n, ...) != value}, state

    @property
    def conditions(self) -> ClassConditions | TextConditions:
        """The classes of the configuration, or texts."""
        config = self.config
        if config.text_dim is None:
            return ClassConditions(config.num_classes, config.class_names)
        null_embeds = self.text_emb.null_embeds
        return TextConditions(
            text_dim=config.text_dim, max_positions=config.max_text_positions, null_embeds=null_embeds
        )

    @property
    def num_prefix(self) -> int:
        """P, the most positions before the first token."""
        has_prefix = self.config.text_dim is not None and self.config.has_text_prefix
        return self.config.max_text_positions if has_prefix else 0

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def embedding_dim(self) -> int:
        """C."""
        return self.config.embedding_dim

    @property
    def takes_indices(self) -> bool:
        """Whether the input is a table over indices, not a linear map of code vectors."""
        return self.config.input_embedding == "tokens"

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as VAR does; children come before parents, which rescale them."""
        std = (3 * self.config.hidden_size) ** -0.5
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.trunc_normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, BlockAttention):
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
            if module.is_normalized:
                init.constant_(module.scale_mul_1H11, 1.3862943611198906)  # ln 4
        elif isinstance(module, TextEmbedder):
            for name in ("constant_vector", "null_embed", "empty_embeds"):
                if hasattr(module, name):
                    init.trunc_normal_(getattr(module, name), std=std)
        elif isinstance(module, PriorLayer) and self.config.use_shared_adaln:
            offsets = torch.empty_like(module.ada_gss).normal_(std=self.config.hidden_size**-0.5)
            init.copy_(module.ada_gss, self._gated(offsets, dim=2))
        elif isinstance(module, BlockPrior):
            init.trunc_normal_(module.pos_start, std=std)
            init.trunc_normal_(module.pos_1LC, std=std)
            init.trunc_normal_(output_projection(module.head).weight, std=0.02 * std)
            # Not in a branch of their own: transformers passes over modules that hold no parameter directly.
            init.trunc_normal_(module.head_nm.ada_lin[1].weight, std=0.5 * std)
            for layer in module.blocks:
                self._init_layer(layer, std)

    def _init_layer(self, layer: PriorLayer, std: float) -> None:
        """Shrink what a layer adds to the residual stream: the deeper the model, the smaller."""
        branch_std = std / (2 * self.config.num_layers) ** 0.5
        init.trunc_normal_(layer.attn.proj.weight, std=branch_std)
        init.trunc_normal_(layer.ffn.fc2.weight, std=branch_std)
        if not self.config.use_shared_adaln:
            weight = nn.init.trunc_normal_(torch.empty_like(layer.ada_lin[1].weight), std=std)
            init.copy_(layer.ada_lin[1].weight, self._gated(weight, dim=0))

    def _gated(self, modulation: Tensor, dim: int) -> Tensor:
        """Scale the initial gates, the first third along `dim`, by their own factor and the rest by a half."""
        gates, rest = modulation.tensor_split([modulation.shape[dim] // 3], dim)
        return torch.cat([gates * self.config.adaln_gamma_init, rest * 0.5], dim)

    def forward(
        self,
        var_input: Tensor,
        class_labels: Tensor | Condition | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        loss_chunk_size: int | None = None,
        orders: None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        known_digits: Tensor | None = None,
    ) -> PriorOutput | tuple:
        """Predict all blocks under teacher forcing.

        Args:
            var_input: (B, L − L_1, C) from `idxBl_to_var_input`, or (B, L − L_1) int64 where `input_embedding` is
                "tokens".
            class_labels: (B,) int64 in [0, num_classes]; num_classes is the null class. Or a condition.
            labels: (B, L) int64 indices to predict, in block order, −100 for those to ignore; gives the loss.
            return_dict: False returns a tuple of what is not None.
            loss_chunk_size: compute the loss this many tokens at a time and return no logits: those of all B·L tokens,
                and their gradient, then never exist together. Needs labels; None computes all at once.
            orders: None alone: blocks come in the layout's order.
            text_embeds: (B, T, E) text features in place of labels, of a prior that is conditioned on text.
            text_mask: (B, T) which of them are valid; None says all.
            known_digits: (B, L, n) bool, the digits that a head of "masked_digits" is shown while it learns; None hides
                digits at random in training mode, with torch's default generator, and in evaluation mode gives the
                likelihood of the passes that sampling takes.

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
        vector, shared, prefix, prefix_mask = self._embed_condition(condition)
        attend = partial(block_causal_attention, layout=self.layout, scale=self.blocks[0].attn.scale)
        hidden_states = torch.cat([self._first_input(vector), self._embed_input(var_input)], dim=1)
        block_ids = self.layout.block_ids(self.pos_1LC.device)
        positions = self.pos_1LC + self.lvl_embed(block_ids)
        hidden_states, num_prefix = hidden_states + positions.to(hidden_states.dtype), 0
        if prefix is not None:
            hidden_states, num_prefix = torch.cat([prefix, hidden_states], dim=1), prefix.shape[1]
            options = {"num_prefix": num_prefix, "prefix_mask": prefix_mask}
            attend = partial(prefixed_attention, layout=self.layout, scale=self.blocks[0].attn.scale, **options)
        for layer in self.blocks:
            # Its modulation is its own affair: where weights are sharded, they are there in its forward pass alone.
            hidden_states = layer(hidden_states, shared, attend)
        hidden_states = self._head_input(hidden_states[:, num_prefix:], self.head_nm.modulation(vector))
        return predicted(self, self.head, hidden_states, labels, return_dict, loss_chunk_size, known_digits)

    def context(self, condition: Condition) -> Context:
        """Compute all that depends on the condition alone: its embedding, each layer's modulation, and the head's."""
        vector, shared, prefix, prefix_mask = self._embed_condition(condition)
        modulations = [tuple(layer.modulation(shared)) for layer in self.blocks]
        modulations.append(tuple(self.head_nm.modulation(vector)))
        return Context(vector=vector, prefix=prefix, prefix_mask=prefix_mask, modulations=tuple(modulations))

    def new_cache(self, num_rows: int) -> KeyValueCache:
        """Allocate keys and values of all layers, P prefix positions and L tokens."""
        num_heads, D = self.config.num_heads, self.config.hidden_size
        shape = (num_rows, num_heads, self.num_prefix + self.layout.num_tokens, D // num_heads)
        return KeyValueCache(self.config.num_layers, shape, self.pos_start.dtype, self.pos_start.device)

    def decode_block(self, content: Tensor | None, k: int, context: Context, cache: KeyValueCache) -> Tensor:
        """Run block k; see `family.Prior`."""
        start, end = self.layout.bounds[k]
        # A prefix lies at the end of the positions that there are for one.
        P = self.num_prefix
        first = P if context.prefix is None else P - context.prefix.shape[1]
        if content is None:
            if context.prefix is not None:
                self._run(context.prefix, (first, first, P), context, cache)
            block_input = self._first_input(context.vector)
        else:
            # Unconditional rows see the same tokens as the conditional ones.
            block_input = self._embed_input(content).repeat(len(context) // len(content), 1, 1)
        level = self.lvl_embed(self.layout.block_ids(self.pos_1LC.device)[start : start + 1])
        hidden_states = block_input + (self.pos_1LC[:, start:end] + level)
        return self._run(hidden_states, (first, P + start, P + end), context, cache)

    def _run(self, x: Tensor, span: tuple[int, int, int], context: Context, cache: KeyValueCache) -> Tensor:
        """Run new positions (R, l, D) through all layers; of the span, see `LayerStack`."""
        positions, P = None, self.num_prefix
        if not self.layout.is_scales:
            positions = self.layout.made_once(
                ("prefix and token positions", P), x.device, lambda: torch.arange(P + self.layout.num_tokens)
            )[span[1] : span[2]]
        return self.blocks(x, context.modulations[:-1], cache, span, positions, context.prefix_mask)

    def logits(self, hidden_states: Tensor, context: Context, digits: Tensor | None = None) -> Tensor:
        """Return scores, (R, l, D) → (R, l, S), in float32; see `family.Prior`."""
        return head_scores(self.head, self._head_input(hidden_states, context.modulations[-1]), digits)

    def _head_input(self, hidden_states: Tensor, head_modulation: tuple[Tensor, Tensor]) -> Tensor:
        """Return what the output projection takes, normalised in the model's precision and not in autocast's."""
        # Sharded weights come in the run's half type, while hidden states are float32.
        dtype = torch.promote_types(output_projection(self.head).weight.dtype, hidden_states.dtype)
        with outside_autocast(hidden_states.device):
            return self.head_nm(hidden_states.to(dtype), tuple(part.to(dtype) for part in head_modulation))

    def _embed_condition(self, condition: Condition) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return a vector (R, D), what layers make modulations of (it, or (R, 1, 6, D) for all), prefix and mask."""
        prefix = prefix_mask = None
        if isinstance(condition, TextCondition):
            vector, prefix, prefix_mask = self.text_emb(condition)
        else:
            vector = self.class_emb(condition.class_labels)
        shared = vector
        if self.config.use_shared_adaln:
            shared = rearrange(self.shared_ada_lin(vector), "b (six d) -> b 1 six d", six=6)
        return vector, shared, prefix, prefix_mask

    def _first_input(self, vector: Tensor) -> Tensor:
        """Return the first block's input (R, L_1, D), before positions are added."""
        return vector[:, None] + self.pos_start

    def _embed_input(self, var_input: Tensor) -> Tensor:
        """Map the later blocks' input, vectors (B, l, C) or indices (B, l), to (B, l, D)."""
        return self.word_embed(var_input if self.takes_indices else var_input.to(self.word_embed.weight.dtype))

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
        """Sample the indices of a batch of images, block by block.

        Args:
            class_labels: (B,) int64 in [0, num_classes]; num_classes is the null class. Or a condition.
            quantizer: the tokenizer's quantizer, which turns sampled indices into the next block's input.
            text_embeds, text_mask: see `forward`.
            generator: one for all images, or a list with one for each.
            given_idx_Bl: K tensors (B, L_k) int64 of tokens that are already known, −1 for those to sample: a prefix to
                go on from, or the surroundings of what is painted in. None samples all.
            on_block_end: receives each block's `BlockStep`, and may change it.
            is_guidance_fixed: whether `on_block_end` leaves the guidance alone; costs nothing where it does.
            options: fields of `SamplingOptions`: `guidance_scale`, `guidance_schedule`, `guidance_power`,
                `temperature`, `top_k`, `top_p`, `min_p`, `is_smooth`.

        Returns:
            K tensors (B, L_k) int64, fewer if `on_block_end` stops.

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
