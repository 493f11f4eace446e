"""Judges a pipeline trained on emoji: which of all real pictures is the nearest to what it draws of a caption?

    python examples/emoji_judge.py --pipeline out/emoji/pipeline --pictures out/emoji/pictures --output_dir out/emoji

Pictures are compared at 16×16 pixels. "exact" is the caption's own picture, "family" the same emoji in any tone or
gender, "tone" the right one among the emoji's own tones. Legend: N pictures, C captions, n samples of each.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from emoji_pictures import family_of, is_held_out, tones_of
from PIL import Image

from nextblock import TextToImagePipeline
from nextblock.evaluation.pictures import captioned_grid, save_picture
from nextblock.evaluation.report import write_json

COMPARED_SIDE, NUM_SAMPLES = 16, 4
GROUPS = {"held_out": 60, "seen_toned": 30, "seen_untoned": 30}


def read_pictures(folder: Path) -> tuple[list[str], list[Image.Image]]:
    """Return the captions of all N pictures, and the pictures."""
    captions, pictures = [], []
    for split in ("train", "test"):
        for line in (folder / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            captions.append(row["text"])
            with Image.open(folder / split / row["file_name"]) as picture:
                pictures.append(picture.convert("RGB"))
    return captions, pictures


def small(pictures: list[Image.Image]) -> torch.Tensor:
    """Shrink pictures, (N, 768) in [0, 1]."""
    side = (COMPARED_SIDE, COMPARED_SIDE)
    pixels = np.stack([np.asarray(picture.resize(side, Image.Resampling.BOX)) for picture in pictures])
    return torch.from_numpy(pixels.reshape(len(pictures), -1)).double() / 255


def chosen_captions(captions: list[str]) -> dict[str, list[str]]:
    """Choose the captions that are judged, by a hash of their words."""
    by_hash = sorted(captions, key=lambda caption: hashlib.sha256(caption.encode()).digest())
    groups = {
        "held_out": [caption for caption in by_hash if is_held_out(caption)],
        "seen_toned": [caption for caption in by_hash if tones_of(caption) and not is_held_out(caption)],
        "seen_untoned": [caption for caption in by_hash if not tones_of(caption)],
    }
    return {name: group[: GROUPS[name]] for name, group in groups.items()}


def figures(distances: torch.Tensor, wanted: list[str], captions: list[str]) -> dict[str, float]:
    """Score pictures by their nearest real ones.

    Args:
        distances: (C·n, N) of drawn pictures to real ones.
        wanted: C·n captions that pictures were drawn of.
        captions: N, of the real pictures.
    """
    nearest = distances.argsort(1)[:, :5].tolist()
    families, words = [family_of(caption) for caption in captions], [c.partition(", ")[0] for c in captions]
    hits = {"family_top1": [], "exact_top1": [], "exact_top5": [], "tone_among_own": []}
    for row, (caption, near) in enumerate(zip(wanted, nearest, strict=True)):
        hits["family_top1"].append(families[near[0]] == family_of(caption))
        hits["exact_top1"].append(captions[near[0]] == caption)
        hits["exact_top5"].append(caption in [captions[number] for number in near])
        own = [n for n, word in enumerate(words) if word == caption.partition(", ")[0] and tones_of(captions[n])]
        if tones_of(caption) and len(own) > 1:
            hits["tone_among_own"].append(captions[min(own, key=lambda n: distances[row, n])] == caption)
    return {name: round(sum(values) / len(values), 3) for name, values in hits.items() if values}


def judge(pipe: TextToImagePipeline, folder: Path, guidance_scales: list[float], output_dir: Path, seed: int) -> dict:
    """Draw and score, reconstructions as the ceiling and captions of others as the floor beside it.

    Args:
        pipe: trained on the pictures.
        folder: of the pictures.
        guidance_scales: to draw with; the pipeline's own where there are none.
        output_dir: for `result.json`, and `samples.png` of the first scale.
        seed: of the samples.

    Returns:
        What the file says.
    """
    captions, pictures = read_pictures(folder)
    real, groups = small(pictures), chosen_captions(captions)
    by_caption = dict(zip(captions, pictures, strict=True))
    result = {"reconstructions": {}, "seed": seed, "num_samples": NUM_SAMPLES, "guidance": {}}
    for name, group in groups.items():
        drawn = small(pipe.reconstruct([by_caption[caption] for caption in group]).images)
        result["reconstructions"][name] = figures(torch.cdist(drawn, real), group, captions)
    for scale in guidance_scales or [pipe.sampling.guidance_scale]:
        scores, sheet = {}, []
        for name, group in groups.items():
            generator = torch.Generator().manual_seed(seed)
            options = {"guidance_scale": scale, "num_images_per_prompt": NUM_SAMPLES, "generator": generator}
            images = pipe(group, **options).images
            wanted = [caption for caption in group for _ in range(NUM_SAMPLES)]
            distances = torch.cdist(small(images), real)
            scores[name] = figures(distances, wanted, captions)
            if name == "held_out":
                # Each picture is scored as if it were of another caption: how often chance alone is right.
                others = [caption for caption in reversed(group) for _ in range(NUM_SAMPLES)]
                scores["shuffled"] = figures(distances, others, captions)
            sheet += [(caption, images[NUM_SAMPLES * k :][:NUM_SAMPLES]) for k, caption in enumerate(group[:16])]
        result["guidance"][str(scale)] = scores
        print(f"guidance {scale}: {json.dumps(scores)}")
        if len(result["guidance"]) == 1:
            shown = np.stack([np.asarray(image) for _, images in sheet for image in images])
            picture = captioned_grid(shown, [caption for caption, _ in sheet], 4 * NUM_SAMPLES)
            save_picture(picture, output_dir / "samples.png")
    write_json(result, output_dir / "result.json")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--guidance_scales", type=float, nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    judge(
        TextToImagePipeline.from_pretrained(arguments.pipeline),
        arguments.pictures,
        arguments.guidance_scales,
        arguments.output_dir,
        arguments.seed,
    )
