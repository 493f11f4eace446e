"""The text encoder in a pipeline's folder: transformers loads it, and would fetch code or draw what is missing."""

from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel

from nextblock.files.config_fields import refuse_code
from nextblock.files.regular import is_regular, read_json

_NAME = "text_encoder"


def check_stored_config(folder: str | Path) -> None:
    """Refuse a text encoder that names code of another repository.

    Args:
        folder: of the pipeline; others than those of texts have none.

    Raises:
        ValueError: naming the field and its value.
    """
    path = Path(folder, _NAME, "config.json")
    if is_regular(path):
        fields = read_json(path)
        if not isinstance(fields, dict):
            raise ValueError(f"{path} holds a {type(fields).__name__}, not names and values")
        refuse_code(fields)


def check_stored_weights(model: PreTrainedModel, folder: str | Path, variant: str | None) -> None:
    """Refuse weights that lack some of the text encoder's, which transformers has drawn at random.

    Args:
        model: that was loaded.
        folder: of the pipeline.
        variant: of the weights' files, as it was asked for; None for those of no variant.

    Raises:
        ValueError: naming what is missing.
    """
    files, stored = sorted(Path(folder, _NAME).glob("*.safetensors")), set()
    own = [file for file in files if variant is not None and variant in file.name.split(".")]
    for file in own or files:
        with safe_open(file, "pt") as tensors:
            stored.update(tensors.keys())
    state = model.state_dict(keep_vars=True)
    # One tensor of several names is stored by one of them.
    there = {id(tensor) for name, tensor in state.items() if name in stored}
    missing = sorted(name for name, tensor in state.items() if id(tensor) not in there)
    if missing:
        raise ValueError(
            f"the weights in {str(Path(folder, _NAME))!r} lack {len(missing)} tensors of a {type(model).__name__}: "
            f"{missing[:8]}; expected all"
        )
