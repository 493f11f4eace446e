"""How well codes follow from captions: emoji's tokenizers compared before a prior is trained on any of them.

Kernel ridge regression (Gaussian kernel on the mean of MiniLM's features) maps seen captions to pictures, and to each
digit of each token by one-hot targets, of which the largest is taken. What it makes of held-out captions is judged as
samples are: `tone_among_own` is low where an emoji's codes are its own and say nothing of its other tones.
Legend: N seen captions, G judged captions, L all tokens, E feature channels.

    python examples/emoji_codes.py --pictures out/emoji/pictures --text_encoder "$(cat .venv/installed-emoji)" \
        --tokenizers out/emoji/tokenizer
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emoji_judge import chosen_captions, figures, read_pictures, small
from emoji_pictures import is_held_out
from torch import Tensor

from nextblock.data.code_digits import CodeDigits
from nextblock.data.pixels import to_pictures, to_pixel_values
from nextblock.evaluation.report import write_json
from nextblock.prior.text_encoder import TextEncoder, load_text_encoder
from nextblock.tokenizer import VQVAE

RIDGE = 1e-3


def caption_vectors(encoder: TextEncoder, captions: list[str]) -> Tensor:
    """Return the means of normalised features (…, E)."""
    rows = (torch.from_numpy(row).float() for row in encoder.encode_each(captions))
    return torch.stack([F.layer_norm(row, row.shape[-1:]).mean(0) for row in rows])


def regression_weights(seen: Tensor, judged: Tensor) -> Tensor:
    """Return (G, N), by which the targets of seen captions (N, E) are summed for others (G, E)."""
    mean = seen.mean(0)
    width = (seen - mean).square().sum(1).mean().sqrt()
    seen, judged = (seen - mean) / width, (judged - mean) / width
    kernel, across = (torch.exp(-torch.cdist(rows, seen).square()) for rows in (seen, judged))
    factor = torch.linalg.cholesky(kernel + RIDGE * torch.eye(len(seen)))
    return torch.cholesky_solve(across.T, factor).T


def predicted_tokens(weights: Tensor, idx_NL: Tensor, digits: CodeDigits) -> Tensor:
    """Return the likeliest tokens (G, L), a digit by itself."""
    columns = []
    for tokens in idx_NL.T:
        chosen = [
            (weights @ F.one_hot(values, base).float()).argmax(1)
            for values, base in zip(digits.split(tokens).T, digits.bases, strict=True)
        ]
        columns.append(digits.join(torch.stack(chosen, dim=1)))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def main() -> None:
    """Print and write a row a tokenizer, after that of the pixels themselves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--text_encoder", required=True)
    parser.add_argument("--tokenizers", nargs="+", required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/emoji_codes.json"))
    arguments = parser.parse_args()
    captions, pictures = read_pictures(arguments.pictures)
    groups, real = chosen_captions(captions), small(pictures)
    vectors = caption_vectors(load_text_encoder(arguments.text_encoder, None), captions)
    is_seen = torch.tensor([not is_held_out(caption) for caption in captions])
    judged = torch.tensor([captions.index(caption) for group in groups.values() for caption in group])
    weights = regression_weights(vectors[is_seen], vectors[judged])

    def scores(compared: Tensor) -> dict:
        """Judge (G, 768), group by group."""
        distances = torch.cdist(compared.double(), real).split([len(group) for group in groups.values()])
        return {name: figures(part, groups[name], captions) for name, part in zip(groups, distances, strict=True)}

    rows = {"pixels": scores(weights @ real[is_seen].float())}
    print("pixels", json.dumps(rows["pixels"]))
    seen_pictures = [picture for picture, seen in zip(pictures, is_seen, strict=True) if seen]
    pixel_values = to_pixel_values(np.stack([np.asarray(picture) for picture in seen_pictures]))
    for source in arguments.tokenizers:
        tokenizer = VQVAE.from_pretrained(source).eval()
        idx_NL = torch.cat([tokenizer.img_to_idx(batch) for batch in pixel_values.split(128)])
        digits = tokenizer.quantizer.digits or CodeDigits((tokenizer.config.vocab_size,))
        drawn = to_pictures(tokenizer.idx_to_img(predicted_tokens(weights, idx_NL, digits)))
        rows[source] = scores(small(drawn))
        print(source, json.dumps(rows[source]))
    write_json(rows, arguments.output)


if __name__ == "__main__":
    main()
