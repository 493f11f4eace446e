"""Tensors and models that are spread over processes (FSDP2): their parts, and the whole of them."""

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from nextblock.files.state_dicts import build_without_weights


def sharded_precision(precision: str) -> MixedPrecisionPolicy:
    """Return what FSDP2 computes in which type; under autocast, which it does not enter, as without sharding.

    Args:
        precision: the run's, "no", "bf16" or "fp16".
    """
    if precision == "no":
        return MixedPrecisionPolicy()
    # Weights travel in the run's type. Gradients are summed, and loss and logits given, in float32; what goes from
    # layer to layer is not cast either, as autocast leaves it alone.
    return MixedPrecisionPolicy(
        param_dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision],
        reduce_dtype=torch.float32,
        output_dtype=torch.float32,
        cast_forward_inputs=False,
    )


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole; where it is sharded, all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a process holds only a part of a model's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def load_tensors(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a model the tensors that are there, whole as they are, and leave its others alone.

    Args:
        model: sharded or not; where it is, all processes must call it.
        state: tensors by name, of the model's names and shapes.
    """
    if is_sharded(model):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    else:
        model.load_state_dict(model.state_dict() | state)


@torch.no_grad()
def whole_model(model: nn.Module) -> nn.Module:
    """Copy a sharded model to a whole one on every process; all of them must call it.

    Args:
        model: sharded, with a `config` that its class is built from.

    Returns:
        The copy, in evaluation mode, without gradients.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    # Sharding makes a model an instance of a class derived from FSDPModule and the model's own.
    own_class = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    whole = build_without_weights(own_class, model.config)
    whole.load_state_dict(state, assign=True)
    return whole.requires_grad_(False).eval()
