"""The pipeline: prompts to text features to blocks of indices to images, on the `diffusers` surface.

Legend: B images, n of a batch, K blocks, L_k tokens of block k, T text positions, E feature channels, H×W pixels.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import diffusers
import torch
from diffusers import ImagePipelineOutput
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nextblock.data.captions import is_encodable
from nextblock.prior.sampling import SamplingOptions
from nextblock.prior.text_condition import TextCondition
from nextblock.prior.text_encoder import TextEncoder

from . import editing
from .editing import Output
from .given_images import ImageInput
from .sampling_loop import request_for, run, run_progressively
from .sampling_request import SamplingRequest, check_count, check_counts
from .token_pipeline import TokenPipeline

logger = logging.getLogger(__name__)

Prompts = str | Sequence[str] | None
# Characters of what is cut off from a prompt.
_MAX_QUOTED = 1000


class TextToImagePipeline(TokenPipeline):
    """Sample images of prompts, and edit images that are given.

    Args:
        tokenizer: a `VQVAE`.
        prior: over that tokenizer's indices, conditioned on text; a `BlockPrior` or `LlamaPrior`.
        text_encoder: a text model of transformers; None takes text features alone.
        text_tokenizer: of the text model.
        sampling, card, requires_own_tokenizer: see `ClassToImagePipeline`.

    Raises:
        ValueError: if a component is none of its kind, they do not fit each other, or the prior cannot be sampled so.
    """

    model_cpu_offload_seq = "text_encoder->prior->tokenizer"
    _optional_components = ["text_encoder", "text_tokenizer"]
    _condition_parts = ("text_dim", "max_positions")
    _conditions_expected = "texts"
    _condition_arguments = ("prompt", "num_images_per_prompt")

    def __init__(
        self,
        tokenizer: PreTrainedModel,
        prior: PreTrainedModel,
        text_encoder: PreTrainedModel | None = None,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        sampling: SamplingOptions | dict | None = None,
        card: dict | None = None,
        requires_own_tokenizer: bool = False,
    ):
        super().__init__()
        for name, component, kind in (
            ("text_encoder", text_encoder, PreTrainedModel),
            ("text_tokenizer", text_tokenizer, PreTrainedTokenizerBase),
        ):
            if not isinstance(component, kind | None):
                raise ValueError(f"{name} is a {type(component).__name__}; expected a {kind.__name__}, or None")
        if (text_encoder is None) != (text_tokenizer is None):
            missing = "text_encoder" if text_encoder is None else "text_tokenizer"
            raise ValueError(f"{missing} is None; expected text_encoder and text_tokenizer, or neither")
        texts = {"text_encoder": text_encoder, "text_tokenizer": text_tokenizer}
        self._register(tokenizer, prior, sampling, card, requires_own_tokenizer, **texts)
        width = getattr(getattr(text_encoder, "config", None), "hidden_size", None)
        if text_encoder is not None and width != prior.conditions.text_dim:
            expected = f"{prior.conditions.text_dim}, of the features that the prior takes"
            raise ValueError(f"text_encoder is a {type(text_encoder).__name__} of width {width}; expected {expected}")

    @property
    def _encoder(self) -> TextEncoder:
        """The text model with its tokenizer."""
        if self.text_encoder is None:
            raise ValueError("text_encoder is None, and a prompt is given; expected text_embeds and text_mask")
        length = self.prior.conditions.max_positions
        return TextEncoder(model=self.text_encoder, tokenizer=self.text_tokenizer, max_length=length)

    def __call__(
        self,
        prompt: Prompts = None,
        negative_prompt: Prompts = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: Generator | list[Generator] | None = None,
        idx_Bl: list[Tensor] | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        negative_text_embeds: Tensor | None = None,
        negative_text_mask: Tensor | None = None,
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
            prompt: one text or several; what is longer than the prior reads is cut off, with a warning that quotes it.
            negative_prompt: what guidance leads away from: one text for all prompts, or one each; None leads away from
                what the prior has learned for no text.
            num_images_per_prompt: images of each prompt.
            guidance_scale, guidance_schedule, temperature, top_k, top_p, min_p, guidance_power, is_smooth, order: see
                `prior.sampling.SamplingOptions`; None takes what the pipeline was saved with, `pipe.sampling`.
            text_embeds, text_mask: (P, T, E) features of P prompts in place of texts, and which positions are valid.
            negative_text_embeds, negative_text_mask: of P prompts, or of one, in place of a negative prompt.
            generator, idx_Bl, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs,
                decode_batch_size, batch_size: see `ClassToImagePipeline.__call__`.

        Returns:
            An `ImagePipelineOutput` whose `images` hold all images of the first prompt, then of the second, and so on.

        Raises:
            ValueError: if an argument is outside its range, or there is a negative prompt and no guidance.
        """
        check_counts(output_type, decode_batch_size=decode_batch_size)
        given = {"guidance_scale": guidance_scale, "guidance_schedule": guidance_schedule}
        given |= {"guidance_power": guidance_power, "is_smooth": is_smooth, "order": order}
        given |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        asked = {"generator": generator, "idx_Bl": idx_Bl, "batch_size": batch_size}
        asked |= {"callback": callback_on_step_end, "callback_tensor_inputs": callback_on_step_end_tensor_inputs}
        texts = {"negative_prompt": negative_prompt, "text_embeds": text_embeds, "text_mask": text_mask}
        texts |= {"negative_text_embeds": negative_text_embeds, "negative_text_mask": negative_text_mask}
        asked |= {"options": self.sampling.changed(**given)}
        request = self.make_request(prompt, num_images_per_prompt, **texts, **asked)
        images = run(self, request, output_type, decode_batch_size)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def progressive(
        self,
        prompt: Prompts = None,
        negative_prompt: Prompts = None,
        num_images_per_prompt: int = 1,
        *,
        generator: Generator | list[Generator] | None = None,
        idx_Bl: list[Tensor] | None = None,
        output_type: str = "pil",
        decode_batch_size: int | None = None,
        batch_size: int | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        negative_text_embeds: Tensor | None = None,
        negative_text_mask: Tensor | None = None,
        **options,
    ) -> list:
        """Sample images and decode them after every block: scales so far, or tiles so far on an empty map.

        Args:
            prompt, negative_prompt, num_images_per_prompt: see `__call__`, as for the other arguments.
            generator, idx_Bl, decode_batch_size, batch_size, text_embeds, text_mask, negative_text_embeds,
                negative_text_mask: see `__call__`.
            output_type: "pil", "np" or "pt".
            options: fields of `prior.sampling.SamplingOptions`, else as in `__call__`.

        Returns:
            K entries, each what `__call__` has as `images`; the last equals `__call__`'s.

        Raises:
            ValueError: as for `__call__`.
        """
        check_counts(output_type, editing.PICTURE_TYPES, decode_batch_size=decode_batch_size)
        asked = {"generator": generator, "idx_Bl": idx_Bl, "batch_size": batch_size}
        texts = {"negative_prompt": negative_prompt, "text_embeds": text_embeds, "text_mask": text_mask}
        texts |= {"negative_text_embeds": negative_text_embeds, "negative_text_mask": negative_text_mask}
        asked |= {"options": self.sampling.changed(**options)}
        request = self.make_request(prompt, num_images_per_prompt, **texts, **asked)
        return run_progressively(self, request, output_type, decode_batch_size)

    @torch.no_grad()
    def inpaint(
        self, image: ImageInput, mask_image: ImageInput, prompt: Prompts = None,
        num_images_per_prompt: int = 1, *, fit: str = "crop", **options,
    ) -> Output:
        """Paint part of an image anew, by a prompt; see `ClassToImagePipeline.inpaint`.

        Args:
            image: one image, or one for each prompt.
            mask_image: one mask, or one for each image; white is painted anew.
            prompt, num_images_per_prompt: see `__call__`.
            fit: how images and masks are brought to the tokenizer's size: "crop", "stretch" or "pad".
            options: further arguments of `__call__`.

        Returns:
            As `__call__`.

        Raises:
            ValueError: if images, masks and prompts do not fit each other, or an option is outside its range.
        """
        return editing.inpaint(self, image, mask_image, prompt, num_images_per_prompt, fit, options)

    @torch.no_grad()
    def outpaint(
        self, image: ImageInput, box: tuple[int, int, int, int], prompt: Prompts = None,
        num_images_per_prompt: int = 1, *, fit: str = "crop", **options,
    ) -> Output:
        """Paint what lies around an image, by a prompt; see `ClassToImagePipeline.outpaint`.

        Args:
            image: one image, or one for each prompt.
            box: (left, top, right, bottom) in pixels of the tokenizer's size, where the image goes.
            prompt, num_images_per_prompt, options: see `inpaint`.
            fit: how the image fills the box; see `inpaint`.

        Returns:
            As `__call__`.

        Raises:
            ValueError: if the box does not lie inside the picture, or as for `inpaint`.
        """
        return editing.outpaint(self, image, box, prompt, num_images_per_prompt, fit, options)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], *, warns: bool = True) -> tuple[Tensor, Tensor]:
        """Encode prompts as a call does.

        Args:
            prompt: P texts, or one.
            warns: whether to say what is cut off from those that are too long, see `warn_of_cut`.

        Returns:
            `text_embeds` (P, T, E) and `text_mask` (P, T), which a call takes in place of the prompts.

        Raises:
            ValueError: if the prompts are no texts, or there is no text encoder.
        """
        prompts = _as_prompts("prompt", prompt)
        if warns:
            self.warn_of_cut(prompts)
        return self._encoder.encode(prompts)

    def warn_of_cut(self, prompts: Sequence[str]) -> None:
        """Say of each text that is too long what is cut off from it.

        Args:
            prompts: any number of texts.
        """
        encoder = self._encoder
        for text in dict.fromkeys(prompts):
            lost = encoder.overlong(text)
            if lost:
                shown = f"{text[:80]!r} this is cut off: {lost[:_MAX_QUOTED]!r}{'…' * (len(lost) > _MAX_QUOTED)}"
                logger.warning(f"a prompt has more than {encoder.max_length} tokens; of {shown}")

    def text_fingerprint(self) -> str:
        """Hash all that the features of a prompt depend on: weights and tokenizer of the text encoder, and length."""
        return self._encoder.fingerprint()

    def check_guided(self, options: SamplingOptions, **negative) -> list[str]:
        """Refuse something that guidance is to lead away from where there is no guidance.

        Args:
            options: how tokens are drawn.
            negative: by name, such as `negative_prompt`; None is not given.

        Returns:
            The names of what is given.

        Raises:
            ValueError: naming the first of these.
        """
        given = [name for name, value in negative.items() if value is not None]
        if given and all(scale == 1 for scale in options.scales(self.num_timesteps)):
            expected = f"None without guidance: guidance_scale is {options.guidance_scale}"
            raise ValueError(f"{given[0]} is given; expected {expected}")
        return given

    def make_request(
        self,
        prompt: Prompts = None,
        num_images_per_prompt: int = 1,
        *,
        options: SamplingOptions,
        negative_prompt: Prompts = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        negative_text_embeds: Tensor | None = None,
        negative_text_mask: Tensor | None = None,
        **asked,
    ) -> SamplingRequest:
        """Check what a call asks for as a whole, then encode its prompts.

        Args:
            prompt, num_images_per_prompt, negative_prompt, text_embeds, text_mask, negative_text_embeds,
                negative_text_mask: see `__call__`.
            options: how tokens are drawn.
            asked: see `sampling_loop.request_for`.

        Returns:
            What `sampling_loop.run` takes, once: generators move on.

        Raises:
            ValueError: as for `__call__`.
        """
        check_count("num_images_per_prompt", num_images_per_prompt)
        negative = {"negative_prompt": negative_prompt, "negative_text_embeds": negative_text_embeds}
        given = self.check_guided(options, **negative)
        for prefix, embeds, mask in (
            ("", text_embeds, text_mask), ("negative_", negative_text_embeds, negative_text_mask)
        ):  # fmt: skip
            if mask is not None and embeds is None:
                raise ValueError(f"{prefix}text_mask is given; expected None without {prefix}text_embeds")

        def make_condition() -> TextCondition:
            condition = self._condition("prompt", prompt, text_embeds, text_mask)
            if given:
                opposite = self._condition("negative_prompt", *negative.values(), negative_text_mask)
                if len(opposite) not in (1, len(condition)):
                    raise ValueError(f"{given[0]} holds {len(opposite)} texts; expected 1 or {len(condition)}")
                condition = replace(condition, negative=opposite.repeated(len(condition) // len(opposite)))
            return condition.repeated(num_images_per_prompt)

        return request_for(self, make_condition, options=options, **asked)

    def _condition(
        self, name: str, prompt: Prompts, text_embeds: Tensor | None, text_mask: Tensor | None
    ) -> TextCondition:
        """Return the condition of P texts, or of their features."""
        if (prompt is None) == (text_embeds is None):
            given = "neither" if prompt is None else "both"
            raise ValueError(f"{name} and text features: {given} given; expected one of them")
        if prompt is not None:
            text_embeds, text_mask = self.encode_prompt(_as_prompts(name, prompt))
        return self.prior.conditions.of({"text_embeds": text_embeds, "text_mask": text_mask})

    def _count_conditions(self, prompt: Prompts, options: Mapping) -> int:
        """Count prompts, or the texts whose features are given."""
        if prompt is None and options.get("text_embeds") is not None:
            return len(self._condition("prompt", None, options["text_embeds"], options.get("text_mask")))
        return len(_as_prompts("prompt", prompt))


def _as_prompts(name: str, prompt: Prompts) -> list[str]:
    """Return texts as a list, one at least."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, (list, tuple)) else []
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"{name} is {prompt!r:.80}; expected a text, or a list of at least one")
    if not all(map(is_encodable, prompts)):
        raise ValueError(f"{name} is {prompt!a:.80}; expected whole characters, no half of a pair")
    return prompts


# `DiffusionPipeline.from_pretrained` finds the class that a saved pipeline names among diffusers' own attributes.
diffusers.TextToImagePipeline = TextToImagePipeline
