"""Offloaded models and the methods beside `forward`."""

from torch import nn


def run_offload_hook(module: nn.Module) -> None:
    """Let an offloaded model come to its device, as accelerate's hooks do by themselves for `forward` only.

    Args:
        module: a model; nothing happens where it has no hook.
    """
    # accelerate has no public function that runs a hook.
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
