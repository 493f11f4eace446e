"""Loading and saving of a pipeline: folders and hub repositories of configuration, safetensors and a model card."""

import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, snapshot_download
from PIL import Image
from transformers import PreTrainedModel

from nextblock.evaluation.pictures import image_grid
from nextblock.files.atomic import write_text_whole, write_whole, writing

from .model_card import GRID_NAME, LOADER_NAME, LOADER_TEXT, pipeline_card

_CARD_FACTS = ("recipe", "metrics", "license")


def check_loading(use_safetensors: bool | None, dtype) -> None:
    """Refuse pickled weights, and dtypes that diffusers would replace by float32.

    Raises:
        ValueError: naming the argument, its value and what was expected.
    """
    if use_safetensors not in (None, True):
        raise ValueError(f"use_safetensors is {use_safetensors!r}; expected True: pickled weights are not loaded")
    dtypes = dtype.values() if isinstance(dtype, dict) else [] if dtype is None else [dtype]
    if not all(isinstance(each, torch.dtype) for each in dtypes):
        raise ValueError(f"dtype is {dtype!r}; expected a torch.dtype, or a dict of component → torch.dtype")


def download_pipeline(pretrained_model_name: str, options: Mapping) -> str:
    """Fetch a pipeline from the hub; see `ClassToImagePipeline.download`."""
    names = ("cache_dir", "revision", "token", "force_download", "local_files_only")
    return snapshot_download(
        pretrained_model_name,
        # Vocabularies of text tokenizers have names of many kinds.
        allow_patterns=["*.json", "*.safetensors", "README.md", GRID_NAME, "text_tokenizer/*"],
        **{name: options[name] for name in names if options.get(name) is not None},
    )


def save_pipeline(
    pipe: DiffusionPipeline,
    save_directory: str | os.PathLike,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    push_to_hub: bool = False,
    *,
    recipe: Mapping | None = None,
    metrics: Mapping[str, float] | None = None,
    sample_images: Sequence[Image.Image] | None = None,
    license: str | None = None,
    **hub_options,
) -> None:
    """Save configuration, safetensors and a model card; see `ClassToImagePipeline.save_pretrained`."""
    if safe_serialization is not True:
        raise ValueError(f"safe_serialization is {safe_serialization!r}; expected True")
    if hub_options and not push_to_hub:
        raise ValueError(f"push_to_hub is False; expected True with {sorted(hub_options)}")
    _check_models(pipe)
    folder = Path(save_directory)
    repo_id = hub_options.pop("repo_id", folder.resolve().name)
    with writing(folder):
        _write_folder(pipe, folder, repo_id, variant, max_shard_size, sample_images, (recipe, metrics, license))
    if push_to_hub:
        upload_folder(folder, repo_id, **hub_options)


def _check_models(pipe: DiffusionPipeline) -> None:
    """Refuse adapters: a folder with one alone, or without the model, would be no pipeline to anybody else."""
    for name in ("tokenizer", "prior"):
        model = getattr(pipe, name)
        # PEFT keeps what it replaces as a module's base_layer.
        if not isinstance(model, PreTrainedModel) or any(hasattr(module, "base_layer") for module in model.modules()):
            raise ValueError(
                f"{name} is a {type(model).__name__} with an adapter; expected the model alone: merge the adapter into "
                "it (merge_and_unload), or save the adapter by itself"
            )


def _write_folder(
    pipe: DiffusionPipeline,
    folder: Path,
    repo_id: str,
    variant: str | None,
    max_shard_size: int | str | None,
    sample_images: Sequence[Image.Image] | None,
    facts: tuple,
) -> None:
    """Write weights and configuration, the card and its picture, and what diffusers loads by `custom_pipeline`."""
    given = {name: fact for name, fact in zip(_CARD_FACTS, facts, strict=True) if fact is not None}
    # Through JSON, so that what is saved now is what will be loaded.
    card = json.loads(json.dumps({**(pipe.config.card or {}), **given}, default=str))
    pipe.register_to_config(card=card or None)
    if sample_images is not None:
        pictures, content = np.stack([np.asarray(image.convert("RGB")) for image in sample_images]), io.BytesIO()
        image_grid(pictures, min(8, len(pictures))).save(content, format="PNG")
        pipe._grid = content.getvalue()
    grid = _kept_grid(pipe)
    DiffusionPipeline.save_pretrained(pipe, folder, variant=variant, max_shard_size=max_shard_size)
    if grid is None:
        # Of another pipeline that was saved here before.
        (folder / GRID_NAME).unlink(missing_ok=True)
    else:
        write_whole(folder / GRID_NAME, lambda file: file.write(grid))
    facts = {name: card.get(name) for name in _CARD_FACTS}
    text = pipeline_card(pipe, **facts, has_grid=grid is not None, repo_id=repo_id)
    write_text_whole(folder / "README.md", text)
    write_text_whole(folder / LOADER_NAME, LOADER_TEXT.format(name=type(pipe).__name__))


def keep_grid(pipe: DiffusionPipeline, folder: str | os.PathLike | None) -> None:
    """Keep the picture of a card with the pipeline, for the folders that it will be saved in."""
    path = None if folder is None else Path(folder, GRID_NAME)
    pipe._grid = path.read_bytes() if path is not None and path.is_file() else None


def _kept_grid(pipe: DiffusionPipeline) -> bytes | None:
    """Return the picture of a card; diffusers' own class tells only where the pipeline was loaded from."""
    if not hasattr(pipe, "_grid"):
        keep_grid(pipe, getattr(pipe.config, "_name_or_path", None) or None)
    return pipe._grid


def publish_pipeline(pipe: DiffusionPipeline, repo_id: str, saving: Mapping, **hub_options) -> str:
    """Publish a pipeline with its model card; see `ClassToImagePipeline.push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        _check_saving(saving)
        names = ("variant", "max_shard_size", "sample_images", "recipe", "metrics", "license")
        options = [saving.get(name) for name in names]
        _write_folder(pipe, Path(folder), repo_id, *options[:3], tuple(options[3:]))
        return upload_folder(folder, repo_id, **hub_options)


def _check_saving(saving: Mapping) -> None:
    """Refuse what is no option of saving for the hub."""
    expected = {"safe_serialization", "variant", "max_shard_size", "recipe", "metrics", "sample_images", "license"}
    unknown = sorted(set(saving) - expected)
    if unknown or saving.get("safe_serialization", True) is not True:
        raise ValueError(f"saving options are {dict(saving)}; expected some of {sorted(expected)}, safetensors only")


def upload_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload pipeline",
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> str:
    """Publish a folder; see `ClassToImagePipeline.push_to_hub`."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        folder_path=str(folder), repo_id=repo_id, commit_message=commit_message, create_pr=create_pr
    )
    return commit.commit_url
