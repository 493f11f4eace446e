"""Repositories of the hub that an option may name: asked for once, and shortly; libraries ask again and again."""

import os
from collections.abc import Callable

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

_SECONDS = 5.0


def find_model(source: str, marker: str, here: str = "folder") -> dict[str, bool]:
    """Ask the hub for a model or pipeline that nothing here is called like.

    Args:
        source: as it was given.
        marker: a file that such a repository has.
        here: what else the name might have been of, for the message.

    Returns:
        The option of `from_pretrained` with which it loads: what was downloaded before serves where the hub is away.

    Raises:
        ValueError: if the hub has none of that name, or does not answer and nothing was downloaded.
    """
    is_there = _has_answer(source, "model", here, lambda: isinstance(try_to_load_from_cache(source, marker), str))
    return {"local_files_only": not is_there}


def find_dataset(path: str) -> None:
    """Ask the hub for a dataset, where nothing here is called like it; see `find_model`.

    Args:
        path: as it was given to the library `datasets`.

    Raises:
        ValueError: if the hub has none of that name, or does not answer and the library has kept nothing of it.
    """
    is_other_address = "://" in path or path.startswith("buckets/")
    if not os.path.exists(path) and not is_other_address:
        _has_answer(path, "dataset", "folder", lambda: _is_kept_dataset(path))


def _is_kept_dataset(path: str) -> bool:
    """Tell whether `datasets` has kept a dataset of the hub, which it then reads without it."""
    from datasets.load import CachedDatasetModuleFactory

    try:
        CachedDatasetModuleFactory(path).get_module()
    except FileNotFoundError:
        return False
    return True


def _has_answer(source: str, repo_type: str, here: str, is_kept: Callable[[], bool]) -> bool:
    """Tell whether the hub has a repository, or does not answer while what was downloaded of it serves."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise ValueError(f"no such {here}") from None
    # out/tokenizer may be both; where there is a folder out, it is no owner's name.
    if not source or os.path.isdir(source.partition("/")[0]):
        raise ValueError(f"no such {here}")
    try:
        if constants.is_offline_mode():
            raise ConnectionError("offline mode is on")
        HfApi().repo_info(source, repo_type=repo_type, timeout=_SECONDS)
    except RepositoryNotFoundError:
        raise ValueError(f"no such {here}, and no such repository on the hub") from None
    except Exception as error:
        if is_kept():
            return False
        raise ValueError(f"no such {here}, and the hub does not answer: {error}") from error
    return True
