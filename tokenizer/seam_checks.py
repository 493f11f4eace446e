"""What a codec or a codebook from outside the library must offer and give, looked at before anything is trained.

Legend: B batch, N vectors, V codes, C code channels, h×w latent cells.
"""

import torch
from torch import Tensor, nn

from nextblock.data.blocks import BlockLayout
from nextblock.data.given import check_offers

CODEBOOK_PARTS = (
    *("num_codes", "dim", "prepare", "assign", "lookup"),
    *("loss_terms", "record", "after_step", "start_from"),
)
CODEC_PARTS = ("layout", "encode", "indices", "training_vectors", "decode", "var_input", "start", "advance")
# So many vectors are quantized to see what a codebook gives.
NUM_TRIED = 64


def check_parts(codec: nn.Module, codebook: nn.Module) -> None:
    """Refuse what is no codec or no codebook, by what it offers; nothing is computed.

    Args:
        codec: what shall make tokens of a map.
        codebook: what shall make an index of a vector.

    Raises:
        ValueError: naming what it lacks, or the attribute that is of the wrong kind.
    """
    parts = {"codec": (codec, CODEC_PARTS), "codebook": (codebook, CODEBOOK_PARTS)}
    for name, (part, offered) in parts.items():
        check_offers(name, part, offered, f"a module that satisfies protocols.{name.capitalize()}")
        if not isinstance(part, nn.Module):
            raise ValueError(f"{name} is a {type(part).__name__}; expected a torch.nn.Module")
    for name in ("num_codes", "dim"):
        value = getattr(codebook, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"codebook.{name} is {value!r:.80}; expected a positive integer")
    if codec.layout is not None and not isinstance(codec.layout, BlockLayout):
        raise ValueError(f"codec.layout is {codec.layout!r:.80}; expected a BlockLayout")


@torch.no_grad()
def try_out(codebook: nn.Module, like: Tensor) -> None:
    """Quantize a few vectors, and refuse a codebook that gives other tensors than it must.

    Args:
        codebook: of any kind; what it has recorded or drawn does not change.
        like: a tensor of its device and precision.

    Raises:
        ValueError: naming the method, what it gave and what was expected.
    """
    if like.is_meta:  # Weights are still to come; what was saved has been tried before.
        return
    V, C, N = codebook.num_codes, codebook.dim, NUM_TRIED
    # From far below zero to far above in all channels, and (1, C, h, w) as all maps are.
    rows = torch.linspace(-2, 2, N * C, dtype=like.dtype, device=like.device).view(N, C)
    features = rows.T.reshape(1, C, 1, N).contiguous()
    prepared = codebook.prepare(features)
    _check_given("prepare", prepared, features.shape, like.dtype)
    vectors = prepared[:, :, 0].transpose(1, 2)
    idx = codebook.assign(vectors)
    _check_given("assign", idx, (1, N), torch.int64)
    lowest, highest = idx.min().item(), idx.max().item()
    if not 0 <= lowest <= highest < V:
        raise ValueError(f"codebook.assign gives {lowest} to {highest}; expected 0 to {V - 1}")
    codes = codebook.lookup(idx)
    _check_given("lookup", codes, (1, N, C), like.dtype)
    quantized = codes.transpose(1, 2).reshape(features.shape)
    for is_composed in (False, True):
        terms = codebook.loss_terms(prepared, quantized, is_composed=is_composed)
        if not isinstance(terms, (list, tuple)):
            raise ValueError(f"codebook.loss_terms gives {_described(terms)}; expected a list of scalars")
        for n, term in enumerate(terms):
            _check_given(f"loss_terms[{n}]", term, (), like.dtype)
            if not term.isfinite():
                raise ValueError(f"codebook.loss_terms[{n}] gives {term.item()}; expected a finite number")


def _check_given(method: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse what a method gave, unless it is a tensor of a shape and dtype."""
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        raise ValueError(f"codebook.{method} gives {_described(value)}; expected {dtype} {tuple(shape)}")


def _described(value) -> str:
    """Say what was given."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
