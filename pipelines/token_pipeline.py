"""What the pipelines of classes and of texts share: loading, saving, compiling, reconstruction, how tokens are drawn.

Legend: B images, K blocks, L_k tokens of block k, H×W pixels.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import PreTrainedModel

# diffusers loads a saved pipeline's components only from modules that are imported.
import nextblock.prior
import nextblock.tokenizer  # noqa: F401
from nextblock.prior.sampling import SamplingOptions

from . import editing, storage
from .compiling import compile_pipeline
from .editing import Output
from .given_images import ImageInput
from .pairing import check_components, check_pair, check_stored_pair
from .stored_encoder import check_stored_config, check_stored_weights


class TokenPipeline(DiffusionPipeline):
    """A tokenizer and a prior over its indices; a subclass says what images are conditioned on, and samples them."""

    _callback_tensor_inputs = ["idx", "logits"]
    # Of conditions: what those that the pipeline gives offer, and what they are called.
    _condition_parts: Sequence[str] = ()
    _conditions_expected = ""
    # Of the call: what images are conditioned on, and how many of each there are.
    _condition_arguments: tuple[str, str] = ("", "")

    def _register(
        self,
        tokenizer: PreTrainedModel,
        prior: PreTrainedModel,
        sampling: SamplingOptions | dict | None,
        card: dict | None,
        requires_own_tokenizer: bool,
        **others,
    ) -> None:
        """Check what a pipeline is made of, and keep it."""
        options = SamplingOptions.stored(sampling)
        kind = self._condition_parts, self._conditions_expected
        check_components(tokenizer, prior, card, requires_own_tokenizer, *kind)
        options.check_for(prior)
        check_pair(prior, tokenizer, requires_own_tokenizer)
        self.register_modules(tokenizer=tokenizer, prior=prior, **others)
        self.register_to_config(sampling=asdict(options), card=card)
        self._guidance_scale, self._interrupt = options.guidance_scale, False

    @property
    def sampling(self) -> SamplingOptions:
        """How tokens are drawn where a call does not say; saved with the pipeline."""
        return SamplingOptions.stored(self.config.sampling)

    @property
    def guidance_scale(self) -> float:
        """Scale of the batch at hand; a callback that sets `_guidance_scale` changes that batch's later blocks."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether to stop after the block at hand; a callback that sets `_interrupt` stops its call."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """K, the blocks of a batch: a callback sees as many steps."""
        return self.prior.layout.num_blocks

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs) -> "TokenPipeline":
        """Load a pipeline from a folder or the hub; weights come from safetensors alone.

        Args:
            pretrained_model_name_or_path: the folder or the repository.
            kwargs: of `DiffusionPipeline.from_pretrained`: `dtype`, `variant`, `device_map`, `revision`, `token`, …;
                and `requires_own_tokenizer`.

        Raises:
            ValueError: if `use_safetensors` is False, `dtype` is none, or the tokenizer is refused.
        """
        storage.check_loading(kwargs.get("use_safetensors"), kwargs.get("dtype", kwargs.get("torch_dtype")))
        is_folder = os.path.isdir(pretrained_model_name_or_path)
        folder = pretrained_model_name_or_path if is_folder else cls.download(pretrained_model_name_or_path, **kwargs)
        check_stored_config(folder)
        pipe = super().from_pretrained(folder, **kwargs | {"use_safetensors": True})
        encoder = getattr(pipe, "text_encoder", None)
        if encoder is not None and "text_encoder" not in kwargs:
            check_stored_weights(encoder, folder, kwargs.get("variant"))
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        storage.keep_grid(pipe, folder)
        check_stored_pair(pipe, folder, kwargs)
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Fetch a pipeline's configuration and safetensors from the hub.

        Args:
            pretrained_model_name: the repository.
            kwargs: `cache_dir`, `revision`, `token`, `force_download` and `local_files_only`; others concern the
                loading that follows.

        Returns:
            The local folder.
        """
        return storage.download_pipeline(pretrained_model_name, kwargs)

    @torch.no_grad()
    def reconstruct(
        self, image: ImageInput, decode_batch_size: int | None = None, output_type: str = "pil",
        return_dict: bool = True, *, fit: str = "crop",
    ) -> Output:
        """Encode images to indices and decode them: the best that the tokenizer allows.

        Args:
            image: one or several, see `inpaint` as for `fit`.
            decode_batch_size, output_type, return_dict: see `__call__`.
            fit: how images are brought to size.

        Returns:
            As `__call__`.

        Raises:
            ValueError: if the image is none, or an option is outside its range.
        """
        return editing.reconstruct(self, image, decode_batch_size, output_type, return_dict, fit)

    @torch.no_grad()
    def interpolate(
        self, image_a: ImageInput, image_b: ImageInput, num_steps: int = 8, decode_batch_size: int | None = None,
        output_type: str = "pil", return_dict: bool = True, *, fit: str = "crop",
    ) -> Output:
        """Go from one image to another along the straight line between their quantized maps.

        Args:
            image_a, image_b: the first and the last image, see `inpaint` as for `fit`.
            num_steps: images, the reconstructions of both among them; at least 2.
            decode_batch_size, return_dict: see `__call__`.
            output_type: "pil", "np" or "pt": between two images there are no indices.
            fit: how images are brought to size.

        Returns:
            As `__call__`, with `num_steps` images.

        Raises:
            ValueError: if there are several images on a side, or an option is outside its range.
        """
        sides = image_a, image_b
        return editing.interpolate(self, *sides, num_steps, decode_batch_size, output_type, return_dict, fit)

    def save_pretrained(
        self,
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
        """Save configuration, safetensors and a model card.

        Args:
            save_directory: the folder.
            safe_serialization: True; there are no pickled weights.
            variant: such as "bf16", a part of the weights' file names.
            max_shard_size: largest file of weights.
            push_to_hub: whether to publish the folder, under its name unless there is a `repo_id`.
            recipe: how the pipeline was trained, name → value, for the card; None keeps what it was loaded with, as for
                the next three.
            metrics: what was measured, name → number, for the card.
            sample_images: pictures for the card's grid.
            license: of the weights, such as "apache-2.0"; the card says so where nobody has stated one.
            hub_options: see `push_to_hub`, and `repo_id`.

        Raises:
            ValueError: if `safe_serialization` is False, or options for the hub come without `push_to_hub`.
        """
        files = save_directory, safe_serialization, variant, max_shard_size, push_to_hub
        card = {"recipe": recipe, "metrics": metrics, "sample_images": sample_images, "license": license}
        storage.save_pipeline(self, *files, **card, **hub_options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload pipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **saving,
    ) -> str:
        """Publish the pipeline with its model card.

        Args:
            repo_id: the repository, created if there is none.
            commit_message, create_pr: of the commit, which may be a pull request.
            private: whether a new repository is private; None leaves it to the hub.
            token: None takes the stored one.
            saving: those of `save_pretrained`: `variant`, `recipe`, `metrics`, `sample_images`, `license`, ….

        Returns:
            The commit's address.
        """
        commit = {"commit_message": commit_message, "create_pr": create_pr}
        return storage.publish_pipeline(self, repo_id, saving, private=private, token=token, **commit)

    def compile(self, captures_graphs: bool | None = None, **options) -> None:
        """Compile a block's step, as one graph, and the decoder; the calls that meet a new shape take long.

        Args:
            captures_graphs: whether a call captures steps of tiles as a CUDA graph; None: unless inductor captures.
            options: of `torch.compile`: `mode`, `backend`, `fullgraph`, `dynamic`, ….

        Raises:
            ValueError: if `torch.compile` does not take the options, or graphs would lie in graphs; nothing is changed.
        """
        compile_pipeline(self, captures_graphs, options)
