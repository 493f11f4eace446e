"""Models and pipelines that an option names: a folder of the right kind, or a repository of the hub that answers."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from nextblock.data.tokens import MANIFEST_NAME
from nextblock.evaluation.training_log import RECORD_NAME
from nextblock.files.hub import find_model
from nextblock.files.part_jobs import JOB_NAME
from nextblock.files.regular import read_json
from nextblock.pipelines import ClassToImagePipeline, TextToImagePipeline
from nextblock.prior.text_encoder import TextEncoder, load_text_encoder

from .mistakes import reading

TOKENS_EXPECTED = "a folder that `nextblock tokenize` finished, of this tokenizer"
_PIPELINE, _MODEL = "model_index.json", "config.json"
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
        options |= _found(source, marker, None if is_pipeline else model_class.config_class.model_type)
        return model_class.from_pretrained(source, **options)


def load_given_pipeline(option: str, source: str, **options) -> ClassToImagePipeline | TextToImagePipeline:
    """Load the pipeline that an option names, of classes or of texts; see `load_given`."""
    with reading(option, source, "the folder of a pipeline, or its repository on the hub"):
        where = _found(source, _PIPELINE, None)
        name = DiffusionPipeline.load_config(source, **where).get("_class_name")
        kind = TextToImagePipeline if name == TextToImagePipeline.__name__ else ClassToImagePipeline
        pipe = kind.from_pretrained(source, **where, **options)
        if kind is TextToImagePipeline and pipe.text_encoder is None:
            raise ValueError("it has no text_encoder, which prompts need; expected it to be saved with one")
        return pipe


def load_given_encoder(option: str, source: str, max_length: int | None) -> TextEncoder:
    """Load the text encoder that an option names.

    Args:
        option: as on the command line, without its dashes.
        source: its value, a folder or a repository of the hub.
        max_length: tokens of a text that are read; None takes 120, or all that the model has positions for.

    Raises:
        ValueError: naming the option, its value, what was expected, and what is there instead or wrong with it.
    """
    with reading(option, source, "the folder of a text model and its tokenizer, or their repository on the hub"):
        if os.path.exists(source) and not Path(source, _MODEL).is_file():
            raise ValueError(f"it has no {_MODEL}" if os.path.isdir(source) else "it is a file")
        options = {"local_files_only": True} if os.path.exists(source) else find_model(source, _MODEL)
        return load_text_encoder(source, max_length, **options)


def check_is_no_result(option: str, folder: Path) -> None:
    """Refuse to write what others' pictures and pages are called into the folder of a job, a pipeline or tokens.

    Args:
        option: that names it.
        folder: that may not be there yet.

    Raises:
        ValueError: naming the option, its value and what it is.
    """
    kinds = [kind for name, kind in _KINDS.items() if name != RECORD_NAME and (folder / name).is_file()]
    if kinds:
        raise ValueError(f"{option} is {str(folder)!r}, which is {kinds[0]}; expected a folder of its own")


def _found(source: str, marker: str, model_type: str | None) -> dict[str, bool]:
    """Look for a folder, or ask the hub for a repository; return what loading it takes."""
    if not os.path.exists(source):
        return find_model(source, marker)
    _check_folder(Path(source), marker, model_type)
    return {}


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
