"""The dataset card of a folder of tokens, a function of its manifest alone."""

import json
import re

from nextblock.files.quoting import markdown_text

from .blocks import BlockLayout
from .text_columns import CAPTION, EMBEDS
from .token_shards import index_dtype, split_identifier
from .tokens import TokenManifest


def token_card(manifest: TokenManifest) -> str:
    """Write the card, with the header by which the hub and `datasets` find the splits.

    Args:
        manifest: complete.

    Returns:
        Markdown.
    """
    layout = BlockLayout.from_dict(manifest.layout)
    header = ["---", "tags:", "- nextblock", "- image-tokens", "configs:", "- config_name: default", "  data_files:"]
    table = ["| split | images | rejected | views | rows | shards |", "|---|---|---|---|---|---|"]
    for split, entry in manifest.splits.items():
        # Quoted: "no" and "2024" are no text to YAML.
        header += [f"  - split: {json.dumps(split_identifier(split))}"]
        header += [f"    path: {json.dumps(re.sub('-[0-9]{5}-of-', '-?????-of-', entry['shards'][0]['file']))}"]
        num_rows = sum(shard["num_rows"] for shard in entry["shards"])
        counts = [entry["num_images"], entry["num_rejected"], entry["num_views"], num_rows, len(entry["shards"])]
        table.append(f"| {markdown_text(split)} | " + " | ".join(map(str, counts)) + " |")
    height, width = manifest.image_size
    views = [f"{number}. {name}" for number, name in enumerate(manifest.views)]
    return "\n".join(
        [
            *header,
            "---",
            "# Image tokens",
            "",
            f"Codebook indices of images of {height}×{width} pixels, made with `nextblock tokenize`.",
            "",
            f"- `idx`: {layout.num_tokens} indices below {manifest.vocab_size} ({index_dtype(manifest.vocab_size)}), "
            f"{layout.num_blocks} blocks one after the other",
            *_digits(manifest),
            "- `label`: the class" if manifest.class_names else "- `label`: always 0, the images have no classes",
            "- `image_id`: the image's name in its source",
            "- `view`: which view of the image, as listed below",
            *_texts(manifest),
            "",
            *table,
            "",
            "Views of the training split (other splits have view 0 alone):",
            "",
            *views,
            "",
            f"Tokenizer: SHA-256 `{manifest.tokenizer_sha256}`, configuration in `manifest.json` with layout, "
            "transform and the shards' checksums. Images that could not be used are listed in `rejected.jsonl`.",
            "",
        ]
    )


def _digits(manifest: TokenManifest) -> list[str]:
    """Say how an index is read as digits, where it has any."""
    if not manifest.code_bases:
        return []
    bases = ", ".join(map(str, manifest.code_bases))
    return [f"- the digits of an index have the bases {bases}, the first for ones"]


def _texts(manifest: TokenManifest) -> list[str]:
    """Describe the columns of captions."""
    lines = []
    if CAPTION in manifest.text_names:
        lines.append(f"- `{CAPTION}`: the image's captions, one or more")
    if EMBEDS in manifest.text_names:
        encoder = manifest.text_encoder
        name, width = markdown_text(encoder["name"]), encoder["width"]
        lines.append(f"- `{EMBEDS}`: for each caption the features that {name} gives, tokens × {width} (float16)")
    return lines
