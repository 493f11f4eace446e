"""The pipeline: class labels to blocks of indices to images, on the `diffusers` surface.

Legend: B images, n of a batch, K blocks, L_k tokens of block k, V codes, H×W pixels.
"""

from collections.abc import Callable, Mapping, Sequence

import diffusers
import torch
from diffusers import ImagePipelineOutput
from torch import Generator, Tensor
from transformers import PreTrainedModel

from nextblock.prior.sampling import SamplingOptions

from . import editing
from .editing import Labels, Output
from .given_images import ImageInput
from .labels import resolve_labels
from .sampling_loop import make_request, run, run_progressively
from .sampling_request import check_counts
from .token_pipeline import TokenPipeline


class ClassToImagePipeline(TokenPipeline):
    """Sample images of given classes, and edit images that are given.

    Args:
        tokenizer: a `VQVAE`.
        prior: over that tokenizer's indices; a `BlockPrior`, or of any family that takes class labels.
        sampling: how tokens are drawn where a call does not say: a `SamplingOptions`, or a dict of its fields as it is
            saved with the pipeline; None for its defaults.
        card: what the model card says of the training: dicts `recipe` and `metrics`, and `license`; saved with the
            pipeline, and filled by `save_pretrained`.
        requires_own_tokenizer: refuse a tokenizer other than that whose tokens the prior has learned, not only warn.

    Raises:
        ValueError: if prior or tokenizer is none, they do not fit each other, or the prior cannot be sampled so.
    """

    model_cpu_offload_seq = "prior->tokenizer"
    _condition_parts = ("num_classes", "class_names")
    _conditions_expected = "classes"
    _condition_arguments = ("class_labels", "num_images_per_label")

    def __init__(
        self,
        tokenizer: PreTrainedModel,
        prior: PreTrainedModel,
        sampling: SamplingOptions | dict | None = None,
        card: dict | None = None,
        requires_own_tokenizer: bool = False,
    ):
        super().__init__()
        self._register(tokenizer, prior, sampling, card, requires_own_tokenizer)

    @property
    def class_names(self) -> list[str] | None:
        """The classes by label; None where they have no names, or there are none."""
        return self.prior.conditions.class_names

    @property
    def id2label(self) -> dict[int, str]:
        """Label → class name, or the number where classes have no names; empty for an unconditional model."""
        names = self.class_names or map(str, range(self.prior.conditions.num_classes))
        return dict(enumerate(names))

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: Generator | list[Generator] | None = None,
        idx_Bl: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("idx",),
        decode_batch_size: int | None = None,
        batch_size: int | None = None,
        guidance_power: float | None = None,
        is_smooth: bool | None = None,
        order: str | Sequence[int] | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Args:
            class_labels: classes by number or name; None, or a number of images, for an unconditional model.
            num_images_per_label: images of each label, or of an unconditional model.
            guidance_scale, guidance_schedule, temperature, top_k, top_p, min_p, guidance_power, is_smooth, order: see
                `prior.sampling.SamplingOptions`; None takes what the pipeline was saved with, `pipe.sampling`.
            generator: one that seeds one for each image, or a list of those; an image depends on its own alone.
            idx_Bl: known tokens, K tensors (B, L_k) int64, −1 for those to sample.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or "latent": K tensors (B, L_k).
            return_dict: False returns a tuple.
            callback_on_step_end: called after each block with the pipeline, the block twice (as step and as timestep),
                and a dict of tensors; returns a dict of those it replaces. It may set `_guidance_scale`, `_interrupt`.
            callback_on_step_end_tensor_inputs: "idx" (n, L_k); "logits" (n, L_k, V), redrawn by the same numbers; of a
                prior of digits (n, L_k, S), the scores of all digits side by side.
            decode_batch_size: images decoded at a time; None decodes in the batches that were sampled.
            batch_size: images sampled at a time, the last batch padded: an image is then the same to the bit in all
                requests. None samples up to 64 at a time, and no more than was asked for: the same but for rounding.

        Returns:
            An `ImagePipelineOutput` whose `images` hold all images of the first label, then of the second, and so on.

        Raises:
            ValueError: if an argument is outside its range or a class name is unknown.
        """
        check_counts(output_type, decode_batch_size=decode_batch_size)
        given = {"guidance_scale": guidance_scale, "guidance_schedule": guidance_schedule}
        given |= {"guidance_power": guidance_power, "is_smooth": is_smooth, "order": order}
        given |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        asked = {"generator": generator, "idx_Bl": idx_Bl, "batch_size": batch_size}
        asked |= {"callback": callback_on_step_end, "callback_tensor_inputs": callback_on_step_end_tensor_inputs}
        request = make_request(
            self, class_labels, num_images_per_label, options=self.sampling.changed(**given), **asked
        )
        images = run(self, request, output_type, decode_batch_size)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
            generator, idx_Bl, decode_batch_size, batch_size: see `__call__`.
            output_type: "pil", "np" or "pt".
            options: fields of `prior.sampling.SamplingOptions`, else as in `__call__`.

        Returns:
            K entries, each what `__call__` has as `images`; the last equals `__call__`'s.

        Raises:
            ValueError: if an argument is outside its range or a class name is unknown.
        """
        check_counts(output_type, editing.PICTURE_TYPES, decode_batch_size=decode_batch_size)
        asked = {"generator": generator, "idx_Bl": idx_Bl, "batch_size": batch_size}
        request = make_request(
            self, class_labels, num_images_per_label, options=self.sampling.changed(**options), **asked
        )
        return run_progressively(self, request, output_type, decode_batch_size)

    @torch.no_grad()
    def inpaint(
        self, image: ImageInput, mask_image: ImageInput, class_labels: Labels = None,
        num_images_per_label: int = 1, *, fit: str = "crop", **options,
    ) -> Output:
        """Paint part of an image anew: in-painting and class-conditional editing by a token mask.

        In every block, tokens outside the mask come from the encoded image and tokens inside from the prior, which sees
        those before; all those outside, if it takes orders. A token is inside if at least half of its area is.

        Args:
            image: one image, or one for each label: PIL, or in [0, 1], [-1, 1] or uint8 an array (H, W, 3) or
                (n, H, W, 3) or a tensor (3, H, W) or (n, 3, H, W).
            mask_image: one mask, or one for each image, over all of it: PIL, or an array or tensor (H, W) or (n, H, W)
                of booleans, numbers in [0, 1] or uint8. White is painted anew, black is kept.
            class_labels: see `__call__`.
            num_images_per_label: see `__call__`.
            fit: how images and masks are brought to the tokenizer's size: "crop" to the center as in training,
                "stretch", or "pad" by repeating the edges.
            options: further arguments of `__call__`.

        Returns:
            As `__call__`.

        Raises:
            ValueError: if images, masks and labels do not fit each other, or an option is outside its range.
        """
        return editing.inpaint(self, image, mask_image, class_labels, num_images_per_label, fit, options)

    @torch.no_grad()
    def outpaint(
        self, image: ImageInput, box: tuple[int, int, int, int], class_labels: Labels = None,
        num_images_per_label: int = 1, *, fit: str = "crop", **options,
    ) -> Output:
        """Paint what lies around an image: the image goes into a box of the picture, the rest is sampled.

        Args:
            image: one image, or one for each label.
            box: (left, top, right, bottom) in pixels of the tokenizer's size.
            class_labels, num_images_per_label, options: see `inpaint`.
            fit: how the image fills the box; see `inpaint`.

        Returns:
            As `__call__`.

        Raises:
            ValueError: if the box does not lie inside the picture, or as for `inpaint`.
        """
        return editing.outpaint(self, image, box, class_labels, num_images_per_label, fit, options)

    def resolve_labels(self, class_labels: int | str | Sequence[int | str] | Tensor | None) -> list[int]:
        """Turn labels and class names into label numbers; see `nextblock.pipelines.labels`."""
        return resolve_labels(class_labels, self.prior.conditions)

    def _count_conditions(self, class_labels: Labels, options: Mapping) -> int:
        """Count labels; refuse those that there are not."""
        return len(self.resolve_labels(class_labels))


# `DiffusionPipeline.from_pretrained` finds the class that a saved pipeline names among diffusers' own attributes.
diffusers.ClassToImagePipeline = ClassToImagePipeline
