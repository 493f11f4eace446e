"""Sizes of the shipped presets, found without memory for them: parameters, and what a training step keeps of a sample.

Models are built at their real size on the meta device, and a forward pass says which tensors it keeps for the backward
pass. Attention is counted as kernels keep it that hold no scores. The table is that of docs/presets.md:

    python benchmarks/presets.py > docs/presets.md
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from nextblock.command_line import parse_run_config
from nextblock.data.blocks import BlockLayout
from nextblock.prior.families import FAMILIES, family_config
from nextblock.prior.task import PriorTrainConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.task import TokenizerTrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
# Float32 weights and gradients, and the two averages of Adam.
BYTES_A_PARAMETER = 16
# Tokens at 256 px of tokenizers that are converted: MaskGIT's for RAR, VQ-16 for LlamaGen.
PUBLISHED_TOKENS = {
    "rar": {"vocab_size": 1024, "layout": BlockLayout.tiles(1, 16).to_dict()},
    "llamagen": {"vocab_size": 16384, "layout": BlockLayout.tiles(1, 16).to_dict()},
}
# Classes, or channels of the text encoder's features; ImageNet's classes where nothing is said.
CONDITIONS = {"digits": {"num_classes": 10}, "emoji": {"num_classes": 0, "text_dim": 384}}
NUM_TEXT_TOKENS = 12
TEXT = """# The shipped presets

What each needs in training. *Weights* are float32 weights, their gradients and Adam's two averages, of every process; a
weight average (`loop.ema_decay`) is a quarter more. *A sample* and *the batch* are what the forward pass keeps for the
backward pass in float32; bf16 and fp16 keep little more than half. The batch is the preset's `loop.batch_size`, to be
divided by processes and `--loop.gradient_accumulation_steps`. `--gradient_checkpointing true` keeps far less.

These are estimates by `benchmarks/presets.py`, which builds every model at its real size on the meta device; a
discriminator, a perceptual network and what kernels work with come on top. Measured beside them: four samples of
`prior/var-d16` took 4.5 GB on a CPU (`benchmarks/memory.json`), by the table 4.4 GB. Captions have 12 tokens.

| preset | parameters, M | weights, GB | batch size | a sample, GB | the batch, GB |
|---|---|---|---|---|---|
"""


def names() -> list[str]:
    """Return the presets that train a model."""
    paths = [path for stage in ("tokenizer", "prior") for path in sorted((CONFIGS / stage).glob("*.yaml"))]
    found = [f"{path.parent.name}/{path.stem}" for path in paths]
    return [name for name in found if not name.startswith(("tokenizer/evaluate", "tokenizer/tokenize"))]


def build(name: str) -> tuple[nn.Module, int]:
    """Build a preset's model on the meta device.

    Args:
        name: of the preset.

    Returns:
        The model in training mode, and the preset's batch size.
    """
    if name.startswith("tokenizer/"):
        run = _parse(TokenizerTrainConfig, name, "--output_dir", "o")
        with torch.device("meta"):
            return VQVAE(VQVAEConfig(**asdict(run.model))).train(), run.loop.batch_size
    required = ("--tokens", "t", "--tokenizer", "t", "--output_dir", "o", "--pipeline_dir", "p")
    run = _parse(PriorTrainConfig, name, *required)
    config = family_config(run.model, **_tokens(name.removeprefix("prior/")))
    with torch.device("meta"):
        return FAMILIES[run.model.family](config).train(), run.loop.batch_size


def _tokens(kind: str) -> dict:
    """Return what a prior's configuration is told of its tokens: by a shipped tokenizer, or a published one."""
    project = kind.split("-")[0]
    if project in PUBLISHED_TOKENS:
        return {"num_classes": 1000, **PUBLISHED_TOKENS[project]}
    if (CONFIGS / "tokenizer" / f"{kind}.yaml").is_file():
        tokenizer = kind
    else:
        tokenizer = "digits-raster" if project == "digits" else f"var-{512 if kind.endswith('512') else 256}"
    model, _ = build(f"tokenizer/{tokenizer}")
    sizes = {name: getattr(model.config, name) for name in ("vocab_size", "embedding_dim")}
    digits = model.quantizer.digits
    sizes |= {} if digits is None else {"code_bases": list(digits.bases)}
    condition = CONDITIONS.get(project, {"num_classes": 1000})
    return {**condition, "layout": model.layout.to_dict(), **sizes}


def kept_bytes(model: nn.Module) -> int:
    """Return how many bytes a forward pass over one sample keeps, besides the model's own tensors.

    Args:
        model: on the meta device.
    """
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _on_meta():
        if isinstance(model, VQVAE):
            model(torch.empty(1, model.config.num_channels, *model.config.image_size, device="meta"))
        else:
            layout = model.layout
            length = layout.num_tokens - layout.block_lengths[0]
            if model.takes_indices:
                given = torch.zeros(1, length, dtype=torch.int64, device="meta")
            else:
                given = torch.empty(1, length, model.embedding_dim, device="meta")
            labels = torch.zeros(1, layout.num_tokens, dtype=torch.int64, device="meta")
            model(given, labels=labels, **_condition(model))
    return sum(storage.nbytes() for storage in kept.values())


def _condition(model: nn.Module) -> dict[str, Tensor]:
    """Return the class, or the text, of one sample."""
    text_dim = getattr(model.config, "text_dim", None)
    if text_dim is None:
        return {"class_labels": torch.zeros(1, dtype=torch.int64, device="meta")}
    mask = torch.ones(1, NUM_TEXT_TOKENS, dtype=torch.bool, device="meta")
    return {"text_embeds": torch.empty(1, NUM_TEXT_TOKENS, text_dim, device="meta"), "text_mask": mask}


def row(name: str, *, is_whole: bool = True) -> str:
    """Return a preset's line of the table.

    Args:
        name: of the preset.
        is_whole: False leaves out what a forward pass is needed for.
    """
    model, batch_size = build(name)
    num_parameters = model.num_parameters()
    weights = BYTES_A_PARAMETER * num_parameters / 1e9
    line = f"| `{name}` | {_figure(num_parameters / 1e6)} | {_figure(weights)} | {batch_size} |"
    if not is_whole:
        return line
    kept = kept_bytes(model) / 1e9
    return f"{line} {_figure(kept)} | {_figure(kept * batch_size)} |"


def _figure(number: float) -> str:
    """Write a number with three digits, or all that a large one has."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


class _Attention(torch.autograd.Function):
    """Keeps what attention without scores in memory keeps: queries, keys, values and the result."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


@contextmanager
def _on_meta() -> Iterator[None]:
    """Let models run on the meta device, of which autocast and kernels of attention know nothing."""
    with (
        patch("torch.autocast", lambda *args, **options: nullcontext()),
        patch("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v, **_: _Attention.apply(q, k, v)),
    ):
        yield


def _parse(config_class: type, name: str, *required: str):
    """Read a preset as a command does."""
    return parse_run_config(config_class, command="presets", argv=["--config", name, *required])


if __name__ == "__main__":
    print(TEXT + "\n".join(row(name) for name in names()))
