"""The model card of a saved pipeline.

Legend: K blocks, L_k tokens of block k, V codes, C code channels.
"""

import json
from collections.abc import Mapping
from dataclasses import fields

from nextblock.files.quoting import markdown_text
from nextblock.prior.sampling import SamplingOptions

GRID_NAME = "samples.png"
LOADER_NAME = "pipeline.py"
# It brings no code of its own: what runs is the installed library, or diffusers says that it is missing.
LOADER_TEXT = '''"""Lets diffusers find the pipeline of this folder: custom_pipeline=FOLDER, trust_remote_code=True.

Needs nextblock: pip install nextblock
"""

from nextblock.pipelines import {name}

__all__ = ["{name}"]
# diffusers runs the files of all folders in one module, and takes one pipeline in it.
for _other in {{"ClassToImagePipeline", "TextToImagePipeline"}} - {{*__all__}}:
    globals().pop(_other, None)
'''
_INSTALL = "pip install nextblock"
# What a prior's configuration may say of its size.
_SIZES = {
    "model_type": "{}",
    "num_layers": "{} layers",
    "num_hidden_layers": "{} layers",
    "hidden_size": "width {}",
    "num_heads": "{} heads",
    "num_attention_heads": "{} heads",
    "head": "head {}",
}


def pipeline_card(
    pipe,
    recipe: Mapping | None,
    metrics: Mapping[str, float] | None,
    license: str | None,
    has_grid: bool,
    repo_id: str,
) -> str:
    """Write the card of a pipeline.

    Args:
        pipe: of classes or of texts.
        recipe: how it was trained, name → value; None leaves the section out.
        metrics: what was measured, name → number; None leaves the section out.
        license: of the weights; None where nobody has stated one.
        has_grid: whether a picture of samples lies beside the card.
        repo_id: where the pipeline is published; only a name with an owner is one that others can load.

    Returns:
        Markdown with the header that the hub reads.
    """
    tokenizer, prior, quantizer = pipe.tokenizer, pipe.prior, pipe.tokenizer.quantizer
    layout, is_of_text = prior.layout, _is_of_text(pipe)
    num_classes = 0 if is_of_text else prior.conditions.num_classes
    height, width = tokenizer.config.image_size
    kind = "text-to-image" if is_of_text else "class-conditional" if num_classes else "unconditional"
    shapes = ", ".join(f"{h}×{w}" for h, w in _shortened(layout.shapes))
    # The hub knows no task of class-conditional generation; this is where such models are filed.
    task = "text-to-image" if is_of_text else "unconditional-image-generation"
    lines = ["---", "library_name: diffusers", f"pipeline_tag: {task}"]
    lines += [f"license: {json.dumps(license or 'unknown')}", "tags:", "- nextblock", "- image-generation", "---"]
    lines += [f"# Next-block {kind} {'' if is_of_text else 'image '}generation", ""]
    if has_grid:
        lines += [f"![samples]({GRID_NAME})", ""]
    lines += [
        f"Samples {height}×{width} images block by block: {layout.num_blocks} {layout.kind} of {shapes} tokens.",
        "",
        *_usage(pipe, repo_id if "/" in repo_id else "path/or/repository"),
        "## Model",
        "",
        "| | |",
        "|---|---|",
        f"| layout | {layout.kind}, {layout.num_blocks} blocks, {layout.num_tokens} tokens |",
        f"| latent grid | {layout.grid[0]}×{layout.grid[1]} |",
        f"| codes | {quantizer.num_codes} of {quantizer.dim} channels, {type(quantizer.codebook).__name__} |",
        f"| {'text' if is_of_text else 'classes'} | {_text(pipe) if is_of_text else num_classes or 'none'} |",
        f"| prior | {_sizes(prior.config)} |",
        f"| prior parameters | {_num_parameters(prior):,} |",
        f"| tokenizer parameters | {_num_parameters(tokenizer):,} |",
        "",
    ]
    lines += _table("Recipe", recipe) + _table("Metrics", metrics)
    stated = f"The weights are licensed under {license}." if license else "Nobody has stated a licence of the weights."
    lines += ["## Licence", "", f"{stated} The library nextblock is under Apache-2.0.", ""]
    return "\n".join(lines)


def _usage(pipe, address: str) -> list[str]:
    """Say what to install and how to sample."""
    return [
        "## Use",
        "",
        f"```bash\n{_INSTALL}\n```",
        "",
        "```python",
        f"from nextblock.pipelines import {type(pipe).__name__}",
        "",
        f'pipe = {type(pipe).__name__}.from_pretrained("{address}")',
        f"images = {_call_text(pipe)}.images",
        "```",
        "",
        "Guidance and truncation are stored with the pipeline and count where a call does not give them.",
        "Where nextblock is installed, diffusers loads the same by",
        "`DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True)`.",
        "",
    ]


def _call_text(pipe) -> str:
    """Write the call that samples as the pipeline does by itself, with every option that is set."""
    options = {f.name: getattr(pipe.sampling, f.name) for f in fields(SamplingOptions)}
    options = {name: value for name, value in options.items() if value != getattr(SamplingOptions(), name)}
    arguments = ["4"]
    if _is_of_text(pipe):
        text = "'a prompt'" if pipe.text_encoder is not None else "text_embeds=text_embeds, text_mask=text_mask"
        arguments = [text, "num_images_per_prompt=4"]
    elif pipe.prior.conditions.num_classes:
        arguments = [repr((pipe.class_names or [0])[0]), "num_images_per_label=4"]
    return f"pipe({', '.join([*arguments, *(f'{name}={value!r}' for name, value in options.items())])})"


def _is_of_text(pipe) -> bool:
    """Whether a pipeline takes prompts."""
    return hasattr(pipe.prior.conditions, "text_dim")


def _text(pipe) -> str:
    """Say what encodes prompts."""
    texts = pipe.prior.conditions
    encoder = "no encoder" if pipe.text_encoder is None else type(pipe.text_encoder).__name__
    return f"{encoder}, features of {texts.text_dim} channels, {texts.max_positions} tokens at most"


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
