"""The block-autoregressive prior: a class-conditional transformer over blocks of codebook indices.

VAR (Tian et al. 2024, arXiv:2404.02905) for scales; next-token, next-row and next-patch prediction for tiles.
Legend: B batch, K blocks, L_k tokens of block k, L all tokens, V codes, C code channels, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from nextblock.data.blocks import BlockLayout

from .chunked_loss import chunked_cross_entropy
from .configuration_block_prior import BlockPriorConfig
from .generation import BlockStep, generate_blocks
from .layers import BlockAttention, ModulatedHead, PriorLayer, block_causal_attention
from .sampling import SamplingOptions, draw_uniforms, image_generators


@dataclass
class PriorOutput(ModelOutput):
    """What a prior's forward pass gives.

    Args:
        loss: scalar mean cross-entropy in nats a token, with label smoothing; with labels only.
        logits: (B, L, V) in float32, or float64 for a float64 model; None where the loss was computed in chunks.
        token_loss: (B, L) cross-entropy without label smoothing; with labels only; without gradient where in chunks.
        token_correct: (B, L) whether no code is likelier than the label; with labels only.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_loss: Tensor | None = None
    token_correct: Tensor | None = None


class BlockPrior(PreTrainedModel):
    """Predict every block of indices, all its tokens at once, from a class and the blocks before.

    Args:
        config: the architecture.
    """

    config_class = BlockPriorConfig
    base_model_prefix = "prior"
    main_input_name = "var_input"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PriorLayer"]
    _input_embed_layer = "word_embed"

    def __init__(self, config: BlockPriorConfig):
        super().__init__(config)
        D, V = config.hidden_size, config.vocab_size
        self.layout: BlockLayout = config.block_layout()
        self.class_emb = nn.Embedding(config.num_classes + 1, D)
        if config.input_embedding == "tokens":
            self.word_embed = nn.Embedding(V, D)
        else:
            self.word_embed = nn.Linear(config.embedding_dim, D)
        self.pos_start = nn.Parameter(torch.empty(1, self.layout.block_lengths[0], D))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.layout.num_tokens, D))
        self.lvl_embed = nn.Embedding(self.layout.num_blocks, D)
        if config.use_shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(
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
        self.head = nn.Linear(D, V)
        self.post_init()

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
        elif isinstance(module, PriorLayer) and self.config.use_shared_adaln:
            offsets = torch.empty_like(module.ada_gss).normal_(std=self.config.hidden_size**-0.5)
            init.copy_(module.ada_gss, self._gated(offsets, dim=2))
        elif isinstance(module, BlockPrior):
            init.trunc_normal_(module.pos_start, std=std)
            init.trunc_normal_(module.pos_1LC, std=std)
            init.trunc_normal_(module.head.weight, std=0.02 * std)
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
        class_labels: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        loss_chunk_size: int | None = None,
    ) -> PriorOutput | tuple:
        """Predict all blocks under teacher forcing.

        Args:
            var_input: (B, L − L_1, C) from `idxBl_to_var_input`, or (B, L − L_1) int64 where `input_embedding` is
                "tokens".
            class_labels: (B,) int64 in [0, num_classes]; num_classes is the null class.
            labels: (B, L) int64 indices to predict, in block order; gives the loss.
            return_dict: False returns a tuple of what is not None.
            loss_chunk_size: compute the loss this many tokens at a time and return no logits: those of all B·L tokens,
                and their gradient, then never exist together. Needs labels; None computes all at once.

        Returns:
            A `PriorOutput`.

        Raises:
            ValueError: if a shape, dtype or label does not fit the configuration, or there are chunks but no labels.
        """
        if loss_chunk_size is not None and labels is None:
            raise ValueError(f"loss_chunk_size is {loss_chunk_size} but labels is None; expected None, or labels")
        self._check_inputs(var_input, class_labels, labels)
        condition, shared = self.embed_class(class_labels)
        attend = partial(block_causal_attention, layout=self.layout, scale=self.blocks[0].attn.scale)
        hidden_states = torch.cat([self.first_input(condition), self.embed_input(var_input)], dim=1)
        hidden_states = hidden_states + self.positions().to(hidden_states.dtype)
        for layer in self.blocks:
            # Its modulation is its own affair: where weights are sharded, they are there in its forward pass alone.
            hidden_states = layer(hidden_states, shared, attend)
        head_modulation = self.head_nm.modulation(condition)
        if loss_chunk_size is not None:
            output = self._chunked_loss(hidden_states, head_modulation, labels, loss_chunk_size)
        else:
            output = PriorOutput(logits=self.logits(hidden_states, head_modulation))
            if labels is not None:
                output = self._with_loss(output.logits, labels)
        is_tuple = return_dict is False or (return_dict is None and not self.config.return_dict)
        return output.to_tuple() if is_tuple else output

    def _with_loss(self, logits: Tensor, labels: Tensor) -> PriorOutput:
        """Compare logits with labels."""
        # Not transposed to (B, V, L): that would copy all logits.
        flat, smoothing = (logits.flatten(0, 1), labels.flatten()), self.config.label_smoothing
        token_loss = F.cross_entropy(*flat, reduction="none").view_as(labels)
        loss = F.cross_entropy(*flat, label_smoothing=smoothing) if smoothing else token_loss.mean()
        # The largest value is found several times faster than its place.
        token_correct = logits.gather(-1, labels[..., None])[..., 0] >= logits.amax(-1)
        return PriorOutput(loss, logits, token_loss, token_correct)

    def _chunked_loss(self, hidden_states: Tensor, head_modulation, labels: Tensor, chunk_size: int) -> PriorOutput:
        """Compare with labels a chunk of tokens at a time."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            loss, token_loss, token_correct = chunked_cross_entropy(
                self._head_input(hidden_states, head_modulation),
                self.head.weight,
                self.head.bias,
                labels,
                label_smoothing=self.config.label_smoothing,
                chunk_size=chunk_size,
            )
        return PriorOutput(loss=loss, token_loss=token_loss, token_correct=token_correct)

    def embed_class(self, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class embedding (B, D), and what layers make their modulation of: it, or (B, 1, 6, D) for all."""
        condition = self.class_emb(class_labels)
        if not self.config.use_shared_adaln:
            return condition, condition
        return condition, rearrange(self.shared_ada_lin(condition), "b (six d) -> b 1 six d", six=6)

    def condition(self, class_labels: Tensor) -> tuple[Tensor, list, tuple[Tensor, Tensor]]:
        """Compute all that depends on the class alone, once for all blocks.

        Args:
            class_labels: (B,) int64.

        Returns:
            The class embedding (B, D), each layer's modulation, and the head's.
        """
        condition, shared = self.embed_class(class_labels)
        return condition, [layer.modulation(shared) for layer in self.blocks], self.head_nm.modulation(condition)

    def first_input(self, condition: Tensor) -> Tensor:
        """Return the first block's input (B, L_1, D), before positions are added."""
        return condition[:, None] + self.pos_start

    def embed_input(self, var_input: Tensor) -> Tensor:
        """Map the later blocks' input, vectors (B, l, C) or indices (B, l), to (B, l, D)."""
        if self.config.input_embedding == "codes":
            var_input = var_input.to(self.word_embed.weight.dtype)
        return self.word_embed(var_input)

    def positions(self) -> Tensor:
        """Return the sum of block and position embeddings, (1, L, D)."""
        block_ids = self.layout.block_ids(self.pos_1LC.device)
        return self.pos_1LC + self.lvl_embed.weight.index_select(0, block_ids)

    def logits(self, hidden_states: Tensor, head_modulation: tuple[Tensor, Tensor]) -> Tensor:
        """Return scores of all codes, (B, l, D) → (B, l, V), computed in float32 where the weights are."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = self.head(self._head_input(hidden_states, head_modulation))
            return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _head_input(self, hidden_states: Tensor, head_modulation: tuple[Tensor, Tensor]) -> Tensor:
        """Return what the output projection takes, in its own dtype."""
        dtype = self.head.weight.dtype
        return self.head_nm(hidden_states.to(dtype), tuple(modulation.to(dtype) for modulation in head_modulation))

    @torch.no_grad()
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
        """Sample the indices of a batch of images, block by block.

        Args:
            class_labels: (B,) int64 in [0, num_classes]; num_classes is the null class.
            quantizer: the tokenizer's quantizer, which turns sampled indices into the next block's input.
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
        if hasattr(self, "_hf_hook"):
            self._hf_hook.pre_forward(self)  # Offload hooks fire by themselves on `forward` only.
        class_labels = torch.as_tensor(class_labels, device=self.device)
        self._check_labels(class_labels)
        self.check_quantizer(quantizer)
        options = SamplingOptions(**options)
        options.check(self.config.num_classes, self.config.vocab_size, self.layout.is_scales)
        generators = image_generators(generator, len(class_labels))
        uniforms = draw_uniforms(generators, self.layout.num_tokens).to(self.device)
        if given_idx_Bl is not None:
            given_idx_Bl = [idx.to(self.device) for idx in given_idx_Bl]
            self.check_given(given_idx_Bl, len(class_labels))
        return generate_blocks(
            self,
            quantizer,
            class_labels,
            options.scales(self.layout.num_blocks),
            uniforms,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            given_idx_Bl=given_idx_Bl,
            smooth_generators=generators if options.is_smooth else None,
            on_block_end=on_block_end,
            is_guidance_fixed=is_guidance_fixed or self.config.num_classes == 0,
        )

    def _check_inputs(self, var_input: Tensor, class_labels: Tensor, labels: Tensor | None) -> None:
        """Refuse tensors that do not fit the layout or the vocabulary."""
        self._check_labels(class_labels)
        B, L = len(class_labels), self.layout.num_tokens
        rest = L - self.layout.block_lengths[0]
        takes_indices = self.config.input_embedding == "tokens"
        expected = (B, rest) if takes_indices else (B, rest, self.config.embedding_dim)
        if tuple(var_input.shape) != expected:
            raise ValueError(f"var_input has shape {tuple(var_input.shape)}; expected {expected}")
        if takes_indices != (var_input.dtype == torch.int64):
            kind = "torch.int64 indices" if takes_indices else "floating-point vectors"
            raise ValueError(f"var_input has dtype {var_input.dtype}; expected {kind}")
        if labels is not None and (tuple(labels.shape) != (B, L) or labels.dtype != torch.int64):
            raise ValueError(f"labels is {labels.dtype} {tuple(labels.shape)}; expected torch.int64 {(B, L)}")

    def _check_labels(self, class_labels: Tensor) -> None:
        """Refuse class labels that are no (B,) integers in [0, num_classes]."""
        if class_labels.ndim != 1 or class_labels.dtype != torch.int64:
            raise ValueError(
                f"class_labels is {class_labels.dtype} {tuple(class_labels.shape)}; expected torch.int64 (batch,)"
            )
        if self.training and class_labels.device.type != "cpu":
            return  # Reading the range would make every GPU training step wait for the device.
        null = self.config.null_class
        if class_labels.numel() and not 0 <= class_labels.min().item() <= class_labels.max().item() <= null:
            raise ValueError(f"class_labels is {class_labels.tolist()}; expected 0 to {null} ({null}: no class)")

    def check_given(self, given_idx_Bl: list[Tensor], B: int) -> None:
        """Refuse known tokens that do not fit the layout, the batch or the vocabulary.

        Args:
            given_idx_Bl: see `generate`.
            B: number of images.

        Raises:
            ValueError: naming the block that does not fit.
        """
        self.layout.check_blocks(given_idx_Bl, self.layout.num_blocks)
        V = self.config.vocab_size
        for k, idx in enumerate(given_idx_Bl):
            if len(idx) != B or not -1 <= idx.min().item() <= idx.max().item() < V:
                raise ValueError(
                    f"given_idx_Bl[{k}] has {len(idx)} rows from {idx.min().item()} to {idx.max().item()}; "
                    f"expected {B} rows from -1 (to sample) to {V - 1}"
                )

    def check_quantizer(self, quantizer: nn.Module) -> None:
        """Refuse a quantizer of another layout or codebook.

        Args:
            quantizer: a tokenizer's.

        Raises:
            ValueError: naming what differs.
        """
        got, expected = (quantizer.num_codes, quantizer.dim), (self.config.vocab_size, self.config.embedding_dim)
        if got != expected:
            raise ValueError(f"quantizer has a codebook of shape {got}; expected {expected}")
        if quantizer.layout != self.layout:
            got = quantizer.layout and quantizer.layout.to_dict()
            raise ValueError(f"quantizer has layout {got}; expected {self.layout.to_dict()}")
