"""Parity cases: tiny instances of public architectures, their weights, and what the reference code computes.

Weights are drawn by rule, not stored. `parity/` beside this file keeps the cases cut down; where a
folder shared/parity lies beside the repository, it has them whole. Legend: B batch, H×W pixels.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, from_numpy

KEPT = Path(__file__).with_name("parity")
# Beside the repository, or beside the folder of its worktrees.
_PLACES = [parent / "shared" / "parity" for parent in Path(__file__).parents[2:4]]
WHOLE = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
VAR_CASES = ("var-adaln", "var-shared-adaln")

_TABLES = ("embedding.weight", "class_emb.weight", "lvl_embed.weight", "tok_embeddings.weight")
_TABLES += ("embedding_table.weight", "tok_emb.weight", "embeddings.weight", "quantize.embed.weight")
_NOT_DRAWN = "ema_vocab_hit_SV zero_k_bias attn_bias_for_masking lvl_1L codebook_used freqs_cis".split()
_KEPT_STRIDE = 4
_KEPT_IMAGE_SIZE = 8


@dataclass
class Case:
    """One parity case.

    Args:
        name: file name without its suffix.
        facts: hyperparameters, names and shapes, by stage.
        tensors: inputs and outputs.
        stride: output images hold every stride-th pixel of both sides.
    """

    name: str
    facts: dict
    tensors: dict[str, Tensor]
    stride: int

    def state_dict(self, stage: str, prefix: str) -> dict[str, Tensor]:
        """Draw a stage's weights; counters and derived buffers are left out."""
        facts = self.facts[stage]
        return draw_state_dict(facts["shapes"], self.facts["seed"], prefix, facts.get("table_scale", 0.5))

    def content(self, stage: str = "vq") -> dict:
        """Return what the file of a stage ("vq" or "gpt") holds, as the other project writes it.

        A joint file holds both; weights come with averages, dropped groups and plain entries where the case says so.
        """
        about = self.facts.get("file") or {}
        stages = [name for name in ("vq", "gpt") if name in self.facts] if about.get("joint") else [stage]
        state = {}
        for each in stages:
            prefix = about.get(f"{each}_prefix", "")
            state |= {prefix + name: tensor for name, tensor in self.state_dict(each, f"{each}.").items()}
        if about.get("ema"):
            averages = draw_state_dict(self.facts["vq"]["shapes"], self.facts["seed"], "ema.")
            state |= {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in averages.items()}
            state |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int)}
        if stage == "vq":
            state |= draw_state_dict(about.get("drop") or {}, self.facts["seed"], "drop.")
        if "container" not in about:
            return state
        return {about["container"]: state, "epoch": 3, "global_step": 70, "lr_schedulers": []}

    def image_error(self, images: Tensor, name: str) -> float:
        """Return the largest difference between images (B, 3, H, W) and the reference's."""
        return (images[..., :: self.stride, :: self.stride] - self.tensors[name]).abs().max().item()

    def error(self, tensor: Tensor, name: str) -> float:
        """Return the largest difference between a tensor and the reference's."""
        expected = self.tensors[name].reshape(tensor.shape)
        return (tensor - expected).abs().max().item()


def draw_state_dict(
    shapes: dict[str, list[int]], seed: int, prefix: str, table_scale: float = 0.5
) -> dict[str, Tensor]:
    """Draw float32 weights by name, each from the seed and its own name alone."""
    names = [name for name in shapes if name.rsplit(".", 1)[-1] not in _NOT_DRAWN]
    state = {}
    for name in names:
        if name.endswith("attn.mask"):
            state[name] = torch.ones(shapes[name]).tril()
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shapes[name], dtype=torch.int64)
        else:
            state[name] = from_numpy(_draw(prefix + name, shapes[name], seed, table_scale))
    return state


def _draw(name: str, shape: list[int], seed: int, table_scale: float) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    w = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.float32(1) + np.float32(0.1) * w if name.endswith("weight") else np.float32(0.1) * w
    if name.endswith(".weight") and not name.endswith(_TABLES):
        return w / np.float32(np.sqrt(np.prod(shape[1:])))
    w = np.float32(table_scale) * w
    return np.float32(0.2) * w + np.float32(1.386) if name.endswith("scale_mul_1H11") else w


needs_whole = pytest.mark.skipif(not WHOLE.is_dir(), reason=f"{WHOLE} is not there: no whole parity cases")


def load_case(name: str, is_whole: bool = False) -> Case:
    """Load a case from the cut-down copies, or whole."""
    folder = WHOLE if is_whole else KEPT
    facts = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    if is_whole:
        return Case(name, facts, tensors, 1)
    tensors["img"] = F.interpolate(tensors.pop("coarse_img"), size=(64, 64), mode="bicubic")
    return Case(name, facts, tensors, _KEPT_STRIDE)


def keep(name: str) -> None:
    """Write the cut-down copy of a whole case: input images are smooth, so that 8×8 cells tell them."""
    case = load_case(name, is_whole=True)
    tensors = dict(case.tensors)
    img = tensors.pop("img").double()
    cells = F.interpolate(_unit_maps(), size=(64, 64), mode="bicubic").flatten(1)
    coarse = (img.flatten(2) @ cells.pinverse()).float()
    tensors["coarse_img"] = coarse.unflatten(2, (_KEPT_IMAGE_SIZE, _KEPT_IMAGE_SIZE))
    for key in ("reconstruction", "greedy_img"):
        tensors[key] = tensors[key][..., ::_KEPT_STRIDE, ::_KEPT_STRIDE].contiguous()
    KEPT.mkdir(exist_ok=True)
    save_file(tensors, KEPT / f"{name}.safetensors")
    (KEPT / f"{name}.json").write_text(json.dumps(case.facts, separators=(",", ":")) + "\n")


def _unit_maps() -> Tensor:
    """Return the (64, 1, 8, 8) maps that have a one in one cell."""
    num_cells = _KEPT_IMAGE_SIZE**2
    return from_numpy(np.eye(num_cells)).view(num_cells, 1, _KEPT_IMAGE_SIZE, _KEPT_IMAGE_SIZE)
