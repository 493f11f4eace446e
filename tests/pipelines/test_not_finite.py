"""A pipeline whose models hold NaN or infinity gives an error that names the stage, and no picture."""

import numpy as np
import pytest
import torch
from PIL import Image

IMAGE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
MASK = Image.fromarray(np.repeat([[255] * 8 + [0] * 8], 16, 0).astype(np.uint8))
CALLS = {
    "call": lambda pipe: pipe([0, 1]),
    "latent": lambda pipe: pipe(0, output_type="latent"),
    "progressive": lambda pipe: pipe.progressive(0),
    "inpaint": lambda pipe: pipe.inpaint(IMAGE, MASK, 0),
    "outpaint": lambda pipe: pipe.outpaint(IMAGE, (0, 0, 8, 8), 0),
    "reconstruct": lambda pipe: pipe.reconstruct(IMAGE),
    "interpolate": lambda pipe: pipe.interpolate(IMAGE, IMAGE, num_steps=3, output_type="pt"),
}
READS = ["inpaint", "outpaint", "reconstruct", "interpolate"]
SAMPLES = ["call", "latent", "progressive", "inpaint", "outpaint"]


def poison(module: torch.nn.Module, bad: float) -> None:
    with torch.no_grad():
        [*module.parameters()][-1].view(-1)[0] = bad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("part", "calls", "message"),
    [
        ("encoder", READS, "quantization: the feature map has"),
        ("quantizer.codebook", CALLS, "quantization: codebook.weight has"),
        ("decoder", [name for name in CALLS if name != "latent"], "decoding: the image has"),
        ("head", SAMPLES, "logits of block 0: the prior gives"),
    ],
)
def test_the_stage_is_named(any_pipe, part, calls, message, bad):
    poison((any_pipe.prior if part == "head" else any_pipe.tokenizer).get_submodule(part), bad)
    for name in calls:
        with pytest.raises(ValueError, match=message):
            CALLS[name](any_pipe)


def test_whole_models_give_pictures(any_pipe):
    for call in CALLS.values():
        call(any_pipe)
