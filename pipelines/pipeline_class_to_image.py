"""The pipeline: class labels to blocks of indices to images, on the `diffusers` surface.

Legend: B images, n of a batch, K blocks, L_k tokens of block k, V codes, C code channels, H×W pixels, h×w latent cells.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import snapshot_download
from torch import Generator, Tensor
from transformers import PreTrainedModel

# diffusers loads a saved pipeline's components only from modules that are imported.
import nextblock.prior
import nextblock.tokenizer  # noqa: F401
from nextblock.prior.family import check_given, check_quantizer, compile_layers
from nextblock.prior.generation import generate
from nextblock.prior.sampling import SamplingOptions, image_generators

from .block_loop import BlockLoop
from .editing import PICTURE_TYPES, EditingMixin
from .labels import resolve_labels
from .sampling_request import BatchShape, SamplingRequest, check_callback, check_counts
from .storage import StorageMixin, check_loading


class ClassToImagePipeline(EditingMixin, StorageMixin, DiffusionPipeline):
    """Sample images of given classes, and edit images that are given.

    Args:
        tokenizer: a `VQVAE`.
        prior: over that tokenizer's indices; a `BlockPrior`, or of any family that takes class labels.
    """

    model_cpu_offload_seq = "prior->tokenizer"
    _callback_tensor_inputs = ["idx", "logits"]

    def __init__(self, tokenizer: PreTrainedModel, prior: PreTrainedModel):
        super().__init__()
        if tokenizer is not None and prior is not None:
            check_quantizer(prior, tokenizer.quantizer)
        self.register_modules(tokenizer=tokenizer, prior=prior)
        # A scale factor would round sizes down to its multiples.
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=True)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )
        self._guidance_scale, self._interrupt = 1.0, False

    @property
    def guidance_scale(self) -> float:
        """Scale of the batch at hand; a callback that sets `_guidance_scale` changes that batch's later blocks."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """K, the blocks of a batch: a callback sees as many steps."""
        return self.prior.layout.num_blocks

    @property
    def interrupt(self) -> bool:
        """Whether to stop after the block at hand; set `_interrupt` to ask for it."""
        return self._interrupt

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs) -> "ClassToImagePipeline":
        """Load a pipeline from a folder or the hub; weights come from safetensors alone.

        Args:
            pretrained_model_name_or_path: the folder or the repository.
            kwargs: of `DiffusionPipeline.from_pretrained`: `dtype`, `variant`, `device_map`, `revision`, `token`, ….

        Raises:
            ValueError: if `use_safetensors` is False or `dtype` is none.
        """
        check_loading(kwargs.get("use_safetensors"), kwargs.get("dtype", kwargs.get("torch_dtype")))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs | {"use_safetensors": True})

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
        names = ("cache_dir", "revision", "token", "force_download", "local_files_only")
        return snapshot_download(
            pretrained_model_name,
            allow_patterns=["*.json", "*.safetensors", "README.md"],
            **{name: kwargs[name] for name in names if kwargs.get(name) is not None},
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        idx_Bl: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("idx",),
        decode_batch_size: int | None = None,
        batch_size: int | None = None,
        guidance_power: float = 1.0,
        is_smooth: bool = False,
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            class_labels: classes by number or name; None, or a number of images, for an unconditional model.
            num_images_per_label: images of each label, or of an unconditional model.
            guidance_scale, guidance_schedule, temperature, top_k, top_p, min_p, guidance_power, is_smooth: see
                `prior.sampling.SamplingOptions`.
            generator: one that seeds one for each image, or a list of those; an image depends on its own alone.
            idx_Bl: known tokens, K tensors (B, L_k) int64, −1 for those to sample.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or "latent": K tensors (B, L_k).
            return_dict: False returns a tuple.
            callback_on_step_end: called after each block with the pipeline, the block twice (as step and as timestep),
                and a dict of tensors; returns a dict of those it replaces. It may set `_guidance_scale`, `_interrupt`.
            callback_on_step_end_tensor_inputs: "idx" (n, L_k); "logits" (n, L_k, V), redrawn by the same numbers.
            decode_batch_size: images decoded at a time; None decodes in the batches that were sampled.
            batch_size: images sampled at a time, up to 64 if None; the last batch is padded, so that all round alike.

        Returns:
            An `ImagePipelineOutput` whose `images` hold all images of the first label, then of the second, and so on.

        Raises:
            ValueError: if an argument is outside its range or a class name is unknown.
        """
        check_counts(output_type, decode_batch_size=decode_batch_size)
        options = {"guidance_scale": guidance_scale, "guidance_schedule": guidance_schedule, "top_k": top_k}
        options |= {"guidance_power": guidance_power, "temperature": temperature, "top_p": top_p, "min_p": min_p}
        request = self.request(
            class_labels,
            num_images_per_label,
            options=SamplingOptions(**options, is_smooth=is_smooth),
            generator=generator,
            idx_Bl=idx_Bl,
            batch_size=batch_size,
            callback=callback_on_step_end,
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        images = self.run(request, output_type, decode_batch_size)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def request(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_label: int = 1,
        *,
        options: SamplingOptions,
        generator: Generator | list[Generator] | None = None,
        idx_Bl: list[Tensor] | None = None,
        batch_size: int | None = None,
        callback: Callable | None = None,
        callback_tensor_inputs: Sequence[str] = (),
    ) -> SamplingRequest:
        """Check what is asked for as a whole, before anything is computed.

        Args:
            class_labels: see `__call__`, as for the other arguments.
            num_images_per_label: images of each label.
            options: how tokens are drawn.
            generator: one, or one for each image.
            idx_Bl: known tokens.
            batch_size: images sampled at a time.
            callback: `callback_on_step_end`.
            callback_tensor_inputs: `callback_on_step_end_tensor_inputs`.

        Returns:
            What `run` takes, once: generators move on.

        Raises:
            ValueError: if an argument is outside its range or a class name is unknown.
        """
        check_counts("pil", num_images_per_label=num_images_per_label, batch_size=batch_size)
        options.check_for(self.prior)
        tensor_inputs = check_callback(callback, callback_tensor_inputs, self._callback_tensor_inputs)
        labels = [label for label in self.resolve_labels(class_labels) for _ in range(num_images_per_label)]
        if idx_Bl is not None:
            check_given(self.prior, idx_Bl, len(labels))
        return SamplingRequest(
            condition=self.prior.conditions.of(torch.tensor(labels)),
            # Last: a single generator moves on, which a refused call must not cause.
            generators=image_generators(generator, len(labels)),
            given_idx_BL=None if idx_Bl is None else self.prior.layout.join(idx_Bl),
            options=options,
            batch=BatchShape.choose(len(labels), batch_size, self.prior, self._execution_device),
            callback=callback,
            tensor_inputs=tensor_inputs,
        )

    @torch.no_grad()
    def run(self, request: SamplingRequest, output_type: str = "pil", decode_batch_size: int | None = None):
        """Sample the images of a request.

        Args:
            request: from `request`.
            output_type: see `__call__`.
            decode_batch_size: images decoded at a time; None decodes in the batches that were sampled.

        Returns:
            What `__call__` has as `images`.

        Raises:
            ValueError: if an argument is outside its range.
        """
        check_counts(output_type, decode_batch_size=decode_batch_size)
        with self._hooks_freed():
            images, maps = self._sample(request)
            if output_type != "latent":
                images = self._decode(maps[-1], decode_batch_size or request.batch.num_images, output_type)
        return images

    @torch.no_grad()
    def progressive(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_label: int = 1,
        *,
        generator: Generator | list[Generator] | None = None,
        idx_Bl: list[Tensor] | None = None,
        output_type: str = "pil",
        decode_batch_size: int | None = None,
        batch_size: int | None = None,
        **options,
    ) -> list:
        """Sample images and decode them after every block: scales so far, or tiles so far on an empty map.

        Args:
            class_labels: see `__call__`, as for the other arguments.
            num_images_per_label: images of each label.
            generator: one, or one for each image.
            idx_Bl: known tokens.
            output_type: "pil", "np" or "pt".
            decode_batch_size: images decoded at a time.
            batch_size: images sampled at a time.
            options: fields of `prior.sampling.SamplingOptions`.

        Returns:
            K entries, each what `__call__` has as `images`; the last equals `__call__`'s.

        Raises:
            ValueError: if an argument is outside its range or a class name is unknown.
        """
        check_counts(output_type, PICTURE_TYPES, decode_batch_size=decode_batch_size)
        request = self.request(
            class_labels,
            num_images_per_label,
            options=SamplingOptions(**options),
            generator=generator,
            idx_Bl=idx_Bl,
            batch_size=batch_size,
        )
        with self._hooks_freed():
            _, maps = self._sample(request, keeps_maps=True)
            num_decoded = decode_batch_size or request.batch.num_images
            return [self._decode(features, num_decoded, output_type) for features in maps]

    def compile(self, **options) -> None:
        """Compile the prior's layers and the tokenizer's decoder; the calls that meet a new shape take long.

        Args:
            options: of `torch.compile`: `mode`, `backend`, `dynamic`, …; attention to the cache stays out of graphs.

        Raises:
            ValueError: if `torch.compile` does not take the options; the pipeline then stays as it was.
        """
        if options.get("fullgraph"):
            raise ValueError(f"options are {options}; expected no fullgraph: attention stays out of the graphs")
        try:
            torch.compile(torch.nn.Identity(), **options)
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(f"options are {options}; expected those of torch.compile: {error}") from error
        compile_layers(self.prior, **options)
        self.tokenizer.decoder.compile(**options)

    def resolve_labels(self, class_labels: int | str | Sequence[int | str] | Tensor | None) -> list[int]:
        """Turn labels and class names into label numbers; see `nextblock.pipelines.labels`."""
        conditions = self.prior.conditions
        return resolve_labels(class_labels, conditions.num_classes, conditions.class_names)

    def _sample(self, request: SamplingRequest, keeps_maps: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Sample all images in batches of one shape.

        Returns K tensors (B, L_k) of indices, −1 where a callback stopped before, and the maps (B, C, h, w) after each
        block, or the last alone.
        """
        # The prior calls the quantizer while an offloaded tokenizer waits on the CPU.
        self.tokenizer.quantizer.to(self._execution_device)
        starts, batches, maps = range(0, len(request.condition), request.batch.num_images), [], []
        self._interrupt = False
        with self.progress_bar(total=len(starts) * self.num_timesteps) as bar:
            for start in starts:
                idx_Bl, batch_maps = self._sample_batch(request, start, bar, keeps_maps)
                batches.append(idx_Bl)
                maps.append(batch_maps)
        idx_Bl = [torch.cat(blocks) for blocks in zip(*batches, strict=True)]
        return idx_Bl, [torch.cat(features) for features in zip(*maps, strict=True)]

    def _sample_batch(self, request: SamplingRequest, start: int, bar, keeps_maps: bool):
        """Sample one batch; padded rows are computed and dropped."""
        batch, rows = request.batch, slice(start, start + request.batch.num_images)
        own, given = request.generators[rows], request.given_idx_BL
        n = len(own)
        # Every batch begins as the call says: an image does not depend on what a callback did to another batch.
        self._guidance_scale = request.options.guidance_scale
        loop, idx_Bl = BlockLoop(self, request, n, bar, keeps_maps), []
        if not self.interrupt:
            idx_Bl = generate(
                self.prior,
                request.condition[rows].padded(batch.num_rows),
                self.tokenizer.quantizer,
                request.options,
                own + [torch.Generator().manual_seed(0) for _ in range(batch.num_rows - n)],
                given_idx_BL=None if given is None else batch.pad(given[rows]),
                on_block_end=loop,
                is_guidance_fixed=request.callback is None,
            )
        lengths, device = self.prior.layout.block_lengths[len(idx_Bl) :], self._execution_device
        rest, maps = [torch.full((n, length), -1, device=device) for length in lengths], loop.maps
        # The last map stands for the blocks that an interruption left out.
        maps += [loop.canvas[:n]] * ((self.num_timesteps if keeps_maps else 1) - len(maps))
        return [idx[:n] for idx in idx_Bl] + rest, maps

    @contextmanager
    def _hooks_freed(self):
        """Offload the models again after work on them, also after work that failed."""
        try:
            yield
        finally:
            self.maybe_free_model_hooks()

    def _decode(self, features: Tensor, num_images: int | None, output_type: str):
        """Decode maps (B, C, h, w) in batches of one shape."""
        if hasattr(self.tokenizer, "_hf_hook"):
            self.tokenizer._hf_hook.pre_forward(self.tokenizer)  # Offload hooks fire by themselves on `forward` only.
        batch = BatchShape.choose(len(features), num_images, self.tokenizer, self._execution_device)
        images = [
            self.tokenizer.decode(batch.pad(part))[: len(part)].clamp(-1, 1).float()
            for part in features.split(batch.num_images)
        ]
        return self.image_processor.postprocess(torch.cat(images), output_type=output_type)


# `DiffusionPipeline.from_pretrained` finds the class that a saved pipeline names among diffusers' own attributes.
diffusers.ClassToImagePipeline = ClassToImagePipeline
