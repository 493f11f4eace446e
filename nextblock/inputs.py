"""Models and pipelines that an option names: a folder of the right kind, or a repository of the hub that answers."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from nextblock.data.tokens import MANIFEST_NAME
from nextblock.evaluation.training_log import RECORD_NAME
from nextblock.files.part_jobs import JOB_NAME
from nextblock.files.regular import is_regular, read_json
from nextblock.pipelines import ClassToImagePipeline, TextToImagePipeline
from nextblock.prior.text_encoder import TextEncoder, load_text_encoder

from .mistakes import reading

TOKENS_EXPECTED = "a folder that `nextblock tokenize` finished, of this tokenizer"
_PIPELINE, _MODEL = "model_index.json", "config.json"
_HUB_SECONDS = 5.0
# What a folder is by a file in it, the telling ones first.
_KINDS = {
    _PIPELINE: "a pipeline",
    MANIFEST_NAME: "a folder of tokens",
    RECORD_NAME: "the output folder of a training",
    JOB_NAME: "the output folder of a job",
}


def load_given(option: str, source: str, model_class: type, **options) -> Any:
    """Load the model or pipeline that an option names.

    Args:
        option: as on the command line, without its dashes.
        source: its value, a folder or a repository of the hub.
        model_class: with a `from_pretrained`: of a model, or `ClassToImagePipeline`.
        options: of `from_pretrained`.

    Raises:
        ValueError: naming the option, its value, what was expected, and what is there instead or wrong with it.
    """
    is_pipeline = not hasattr(model_class, "config_class")
    kind = "a pipeline" if is_pipeline else f"a saved {model_class.__name__}"
    marker = _PIPELINE if is_pipeline else _MODEL
    with reading(option, source, f"the folder of {kind}, or its repository on the hub"):
        if os.path.exists(source):
            _check_folder(Path(source), marker, None if is_pipeline else model_class.config_class.model_type)
        else:
            options |= _hub_options(source, marker)
        return model_class.from_pretrained(source, **options)


def load_given_pipeline(option: str, source: str, **options) -> ClassToImagePipeline | TextToImagePipeline:
    """Load the pipeline that an option names, of classes or of texts; see `load_given`."""
    path, kind = Path(source, _PIPELINE), ClassToImagePipeline
    if is_regular(path):
        with reading(option, source, "the folder of a pipeline, or its repository on the hub"):
            name = _content(path).get("_class_name")
    else:
        name = _pipeline_on_hub(source)
    if name == TextToImagePipeline.__name__:
        kind = TextToImagePipeline
    return load_given(option, source, kind, **options)


def _pipeline_on_hub(source: str) -> str | None:
    """Return the class that a repository's pipeline names; None where there is no answer, which loading will tell."""
    if os.path.exists(source):
        return None
    with suppress(Exception):
        return DiffusionPipeline.load_config(source, **_hub_options(source, _PIPELINE)).get("_class_name")
    return None


def load_given_encoder(option: str, source: str, max_length: int) -> TextEncoder:
    """Load the text encoder that an option names.

    Args:
        option: as on the command line, without its dashes.
        source: its value, a folder or a repository of the hub.
        max_length: tokens of a text that are read.

    Raises:
        ValueError: naming the option, its value, what was expected, and what is there instead or wrong with it.
    """
    with reading(option, source, "the folder of a text model and its tokenizer, or their repository on the hub"):
        if os.path.exists(source) and not Path(source, _MODEL).is_file():
            raise ValueError(f"it has no {_MODEL}" if os.path.isdir(source) else "it is a file")
        options = {"local_files_only": True} if os.path.exists(source) else _hub_options(source, _MODEL)
        return load_text_encoder(source, max_length, **options)


def _check_folder(folder: Path, marker: str, model_type: str | None) -> None:
    """Refuse what is no folder of the kind, saying what it is instead and where one may be."""
    if not folder.is_dir():
        raise ValueError("it is a file")
    if not any(folder.iterdir()):
        raise ValueError("it is empty")
    if not (folder / marker).is_file():
        kinds = [kind for name, kind in _KINDS.items() if (folder / name).is_file()]
        inside = [path.parent for path in folder.glob(f"*/{marker}") if _is_of_type(path, model_type)]
        hint = "".join(f"; there is one in {place}" for place in inside)
        raise ValueError(f"it {f'is {kinds[0]}' if kinds else f'has no {marker}'}{hint}")
    found = _content(folder / marker).get("model_type")
    if found != model_type:
        raise ValueError(f"its {marker} has model_type {found!r}, not {model_type!r}")


def _content(path: Path) -> dict:
    """Read a model's or a pipeline's configuration."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not names and values")
    return content


def _is_of_type(path: Path, model_type: str | None) -> bool:
    """Tell whether a file, which nobody named and may be anything, is the configuration of such a model."""
    with suppress(ValueError, OSError):
        return _content(path).get("model_type") == model_type
    return False


def _hub_options(source: str, marker: str) -> dict[str, bool]:
    """Ask the hub once, and shortly, whether it has a repository; what was downloaded before serves without it."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise ValueError("no such folder") from None
    # out/tokenizer may be both; where there is a folder out, it is no owner's name.
    if not source or os.path.isdir(source.partition("/")[0]):
        raise ValueError("no such folder")
    try:
        if constants.is_offline_mode():
            raise ConnectionError("offline mode is on")
        HfApi().model_info(source, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError:
        raise ValueError("no such folder, and no such repository on the hub") from None
    except Exception as error:
        if isinstance(try_to_load_from_cache(source, marker), str):
            return {"local_files_only": True}
        raise ValueError(f"no such folder, and the hub does not answer: {error}") from error
    return {}
