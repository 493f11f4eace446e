"""Autoencoders under other projects' names: their sizes told from shapes, their tensors taken over and given back.

A tensor of ours lies in a checkpoint under one name, or in equal parts, along its first dimension, under several.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, cat

from nextblock.files.state_dicts import (
    Shapes,
    build_without_weights,
    check_state_dict,
    float32_tensors,
    infer_size,
    take_over,
)
from nextblock.tokenizer import VQVAE, VQVAEConfig

from .autoencoder import num_norm_groups

# All published autoencoders normalise in so many groups.
_NUM_GROUPS = 32
# Averages of a codebook in training, which no other project has.
_OURS_ALONE = ("quantizer.codebook.code_sums", "quantizer.codebook.code_counts")
_MAX_BLOCKS = 64

Naming = Callable[[str], tuple[str, ...]]
"""Gives the checkpoint's names of one of our tensors; none for one that it does not have."""


def in_three(naming: Callable[[str], str], name: str) -> tuple[str, ...]:
    """Return a checkpoint's names of one of our tensors where it has q, k and v apart.

    Args:
        naming: gives the one name of a tensor; is asked for `q`, `k` and `v` in place of a joint `qkv`.
        name: ours.
    """
    parts = [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]
    return tuple(naming(part) for part in parts)


def infer_sizes(
    state: Mapping[str, Tensor], naming: Naming, num_levels: int, *, num_more_decoder_blocks: int = 1
) -> dict[str, int | list[int]]:
    """Tell an autoencoder's sizes from shapes, of several tensors where possible: one odd one leads nowhere.

    Args:
        state: tensors by the checkpoint's names.
        naming: gives these names.
        num_levels: resolutions.
        num_more_decoder_blocks: residual blocks that a level of the decoder has more than one of the encoder.

    Returns:
        Arguments of `VQVAEConfig` by name.

    Raises:
        ValueError: if no tensor tells a size, or widths are no multiples of the first one.
    """

    def size(*places: tuple[str, int]) -> int:
        return infer_size(state, *((naming(name)[0], dim) for name, dim in places))

    def count_blocks(level: str) -> int:
        parts = ("norm1", "conv1", "norm2", "conv2")
        return max(
            n + 1 if any(naming(f"{level}.block.{n}.{part}.weight")[0] in state for part in parts) else 0
            for n in range(_MAX_BLOCKS)
        )

    base = size(("encoder.conv_in.weight", 0), ("encoder.conv_in.bias", 0), ("encoder.down.0.block.0.norm1.weight", 0))
    widths = [
        size(
            *(
                (f"{side}.{i}.block.0.{part}.{kind}", 0)
                for side in ("encoder.down", "decoder.up")
                for part in ("conv1", "norm2", "conv2")
                for kind in ("weight", "bias")
            )
        )
        for i in range(num_levels)
    ]
    if any(width % base for width in widths):
        raise ValueError(f"the checkpoint's levels have {widths} channels; expected multiples of {base}")
    pixels = [("encoder.conv_in.weight", 1), ("decoder.conv_out.weight", 0), ("decoder.conv_out.bias", 0)]
    latents = [("encoder.conv_out.weight", 0), ("encoder.conv_out.bias", 0), ("decoder.conv_in.weight", 1)]
    num_blocks = count_blocks("encoder.down.0"), count_blocks("decoder.up.0") - num_more_decoder_blocks
    return {
        "num_channels": size(*pixels),
        "hidden_dim": base,
        "width_multipliers": [width // base for width in widths],
        "num_res_blocks": max(*num_blocks, 1),
        "z_channels": size(*latents),
    }


def take_over_tokenizer(
    config: VQVAEConfig,
    state: Mapping[str, Tensor],
    naming: Naming,
    *,
    derived: Shapes | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> VQVAE:
    """Build a tokenizer of another project's tensors.

    Args:
        config: as its shapes tell.
        state: tensors by the checkpoint's names.
        naming: gives these names.
        derived: shapes of tensors that may be there besides, and are not used.
        constants: tensors of ours, by our names, for which `naming` has none.

    Returns:
        The tokenizer in float32, in evaluation mode.

    Raises:
        ValueError: listing by name what is missing, unexpected or misshapen, or if codes are NaN or infinite.
    """
    model = build_without_weights(VQVAE, config)
    own = {name: (tuple(tensor.shape), naming(name)) for name, tensor in model.state_dict().items()}
    expected = {}
    for shape, names in own.values():
        expected |= {name: (shape[0] // len(names), *shape[1:]) for name in names}
    check_state_dict(dict(state), expected, derived or {})
    joined = {
        name: state[names[0]] if len(names) == 1 else cat([state[each] for each in names])
        for name, (_, names) in own.items()
        if names
    }
    take_over(model, joined | dict(constants or {}))
    model.quantizer.check_finite()
    return model


def foreign_tensors(model: VQVAE, naming: Naming) -> dict[str, Tensor]:
    """Return a tokenizer's tensors by another project's names, in float32 on the CPU.

    Args:
        model: of an architecture that the project has.
        naming: gives its names.
    """
    state = {}
    for name, tensor in float32_tensors(model).items():
        names = () if name in _OURS_ALONE else naming(name)
        if len(names) == 1:
            state[names[0]] = tensor
        elif names:
            state |= {each: part.clone() for each, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return state


def check_expressible(config: VQVAEConfig, project: str, expected: Mapping[str, tuple]) -> None:
    """Refuse a tokenizer that another project has no form for.

    Args:
        config: of the tokenizer.
        project: whose format it is, for the message.
        expected: the values that a field may have, by its name.

    Raises:
        ValueError: naming the field, its value and what was expected.
    """
    if config.codebook == "learned":  # Of other codebooks digits are only a way to write an index.
        expected = {**expected, "codebook_digits": (None,)}
    for field, values in expected.items():
        value = getattr(config, field)
        if value not in values:
            wanted = repr(values[0]) if len(values) == 1 else f"one of {list(values)}"
            raise ValueError(f"{field} is {value!r}; expected {wanted} in {project}'s format")
    if config.hidden_dim % _NUM_GROUPS:
        raise ValueError(f"hidden_dim is {config.hidden_dim}; expected a multiple of {_NUM_GROUPS} for {project}")
    if num_norm_groups(config.hidden_dim, config.min_group_channels) != _NUM_GROUPS:
        raise ValueError(
            f"min_group_channels is {config.min_group_channels}; expected at most {config.hidden_dim // _NUM_GROUPS} "
            f"with hidden_dim {config.hidden_dim}: {project} normalises in {_NUM_GROUPS} groups"
        )
