"""Loading and saving of a pipeline: folders and hub repositories of configuration, safetensors and a model card."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, snapshot_download
from PIL import Image

from nextblock.evaluation.pictures import image_grid

from .model_card import GRID_NAME, pipeline_card


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
        allow_patterns=["*.json", "*.safetensors", "README.md"],
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
    **hub_options,
) -> None:
    """Save configuration, safetensors and a model card; see `ClassToImagePipeline.save_pretrained`."""
    if safe_serialization is not True:
        raise ValueError(f"safe_serialization is {safe_serialization!r}; expected True")
    if hub_options and not push_to_hub:
        raise ValueError(f"push_to_hub is False; expected True with {sorted(hub_options)}")
    folder = Path(save_directory)
    DiffusionPipeline.save_pretrained(pipe, folder, variant=variant, max_shard_size=max_shard_size)
    if sample_images is not None:
        pictures = np.stack([np.asarray(image.convert("RGB")) for image in sample_images])
        image_grid(pictures, min(8, len(pictures))).save(folder / GRID_NAME)
    card = pipeline_card(pipe, recipe, metrics, has_grid=sample_images is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if push_to_hub:
        upload_folder(folder, hub_options.pop("repo_id", folder.resolve().name), **hub_options)


def publish_pipeline(pipe: DiffusionPipeline, repo_id: str, saving: Mapping, **hub_options) -> str:
    """Publish a pipeline with its model card; see `ClassToImagePipeline.push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder, **saving)
        return upload_folder(folder, repo_id, **hub_options)


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
