"""The model card of a saved pipeline.

Legend: K blocks, L_k tokens of block k, V codes, C code channels.
"""

from collections.abc import Mapping

from nextblock.files.quoting import markdown_text

GRID_NAME = "samples.png"
# What a prior's configuration may say of its size.
_SIZES = {
    "model_type": "{}",
    "num_layers": "{} layers",
    "num_hidden_layers": "{} layers",
    "hidden_size": "width {}",
    "num_heads": "{} heads",
    "num_attention_heads": "{} heads",
}


def pipeline_card(pipe, recipe: Mapping | None, metrics: Mapping[str, float] | None, has_grid: bool) -> str:
    """Write the card of a pipeline.

    Args:
        pipe: a `ClassToImagePipeline`.
        recipe: how it was trained, name → value; None leaves the section out.
        metrics: what was measured, name → number; None leaves the section out.
        has_grid: whether a picture of samples lies beside the card.

    Returns:
        Markdown with the header that the hub reads.
    """
    tokenizer, prior = pipe.tokenizer, pipe.prior
    layout, num_classes = prior.layout, prior.conditions.num_classes
    height, width = tokenizer.config.image_size
    kind = "class-conditional" if num_classes else "unconditional"
    label = (prior.conditions.class_names or [0])[0]
    call = f"pipe({label!r}, num_images_per_label=4)" if num_classes else "pipe(4)"
    shapes = ", ".join(f"{h}×{w}" for h, w in _shortened(layout.shapes))
    lines = ["---", "library_name: diffusers", "tags:", "- nextblock", "- image-generation", "---"]
    lines += [f"# Next-block {kind} image generation", ""]
    if has_grid:
        lines += [f"![samples]({GRID_NAME})", ""]
    lines += [
        f"Samples {height}×{width} images block by block: {layout.num_blocks} {layout.kind} of {shapes} tokens.",
        "",
        "```python",
        "from nextblock.pipelines import ClassToImagePipeline",
        "",
        'pipe = ClassToImagePipeline.from_pretrained("path/or/repository")',
        f"images = {call}.images",
        "```",
        "",
        "## Model",
        "",
        "| | |",
        "|---|---|",
        f"| layout | {layout.kind}, {layout.num_blocks} blocks, {layout.num_tokens} tokens |",
        f"| latent grid | {layout.grid[0]}×{layout.grid[1]} |",
        f"| codes | {tokenizer.quantizer.num_codes} of {tokenizer.quantizer.dim} channels |",
        f"| classes | {num_classes or 'none'} |",
        f"| prior | {_sizes(prior.config)} |",
        f"| prior parameters | {_num_parameters(prior):,} |",
        f"| tokenizer parameters | {_num_parameters(tokenizer):,} |",
        "",
    ]
    lines += _table("Recipe", recipe) + _table("Metrics", metrics)
    return "\n".join(lines)


def _shortened(shapes) -> list:
    """Return the block sizes once if all are equal."""
    return list(shapes[:1] if len(set(shapes)) == 1 else shapes)


def _sizes(config) -> str:
    """Say of a prior what its configuration has names for; two names of one fact say it once."""
    facts = (text.format(getattr(config, name)) for name, text in _SIZES.items() if getattr(config, name, None))
    return ", ".join(dict.fromkeys(facts))


def _num_parameters(model) -> int:
    """Count parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _table(title: str, rows: Mapping | None) -> list[str]:
    """Lay out a section of names and values."""
    if not rows:
        return []
    cells = [f"| {markdown_text(name)} | {_cell(value)} |" for name, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *cells, ""]


def _cell(value) -> str:
    """Write a value so that it stays text in its cell."""
    return f"{value:.6g}" if isinstance(value, float) else markdown_text(str(value))
