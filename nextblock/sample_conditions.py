"""What a sampling job draws images of: classes of a pipeline, or prompts of a file.

Legend: n images of a batch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from torch import Generator

from nextblock.files.atomic import write_text_whole
from nextblock.files.regular import read_text
from nextblock.pipelines import ClassToImagePipeline, TextToImagePipeline
from nextblock.pipelines.sampling_loop import make_request
from nextblock.pipelines.sampling_request import SamplingRequest
from nextblock.prior.sampling import SamplingOptions

from .mistakes import reading


class DrawnClasses:
    """Classes of a pipeline, or images of an unconditional one.

    Args:
        pipe: the pipeline.
        class_labels: numbers or names; None for every class.

    Raises:
        ValueError: if a class is unknown.
    """

    def __init__(self, pipe: ClassToImagePipeline, class_labels: list[int | str] | None):
        self._pipe = pipe
        num_classes = pipe.prior.conditions.num_classes
        if class_labels is None and num_classes:
            class_labels = range(num_classes)
        self.labels: list[int] = pipe.resolve_labels(class_labels)
        self.folders = num_classes, pipe.prior.conditions.class_names

    def described(self) -> dict:
        """Return what of the images depends on these."""
        return {"class_labels": self.labels}

    def request(
        self, labels: np.ndarray, generators: list[Generator], options: SamplingOptions, batch_size: int
    ) -> SamplingRequest:
        """Ask for a batch of n images.

        Args:
            labels: (n,) of `labels`.
            generators: n.
            options: how tokens are drawn.
            batch_size: of the job.
        """
        wanted = labels if self._pipe.prior.conditions.num_classes else len(labels)
        return make_request(self._pipe, wanted, options=options, generator=generators, batch_size=batch_size)


class DrawnPrompts:
    """Prompts of a file, numbered by their lines; see `DrawnClasses`.

    Args:
        pipe: the pipeline.
        file: UTF-8 with a prompt a line; blank lines are passed over.
        negative_prompt: what guidance leads away from; None for no text.
        options: how tokens are drawn.

    Raises:
        ValueError: if the file is none, or holds no prompt, or there is a negative prompt and no guidance.
    """

    def __init__(self, pipe: TextToImagePipeline, file: str, negative_prompt: str | None, options: SamplingOptions):
        pipe.check_guided(options, negative_prompt=negative_prompt)
        with reading("prompts", file, "a text file with a prompt a line"):
            # Texts may hold characters at which splitlines would end a line too.
            lines = read_text(file).removeprefix("\ufeff").split("\n")
            self.prompts = [line.strip() for line in lines if line.strip()]
            if not self.prompts:
                raise ValueError("it holds no prompt")
        self._pipe, self._negative_prompt = pipe, negative_prompt
        self.labels = list(range(len(self.prompts)))
        self.folders = len(self.prompts), None

    def described(self) -> dict:
        """Return what of the images depends on these."""
        digest = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        given = {"num_prompts": len(self.prompts), "prompts_sha256": digest, "negative_prompt": self._negative_prompt}
        return {"text_encoder_sha256": self._pipe.text_fingerprint(), **given}

    def request(
        self, labels: np.ndarray, generators: list[Generator], options: SamplingOptions, batch_size: int
    ) -> SamplingRequest:
        """Ask for a batch of images; see `DrawnClasses.request`."""
        prompts = [self.prompts[label] for label in labels.tolist()]
        texts = dict(zip(("text_embeds", "text_mask"), self._pipe.encode_prompt(prompts, warns=False), strict=True))
        if self._negative_prompt is not None:
            negative = self._pipe.encode_prompt(self._negative_prompt, warns=False)
            texts |= dict(zip(("negative_text_embeds", "negative_text_mask"), negative, strict=True))
        return self._pipe.make_request(options=options, generator=generators, batch_size=batch_size, **texts)

    def warn_of_cut(self) -> None:
        """Say once, and not at every batch, what is cut off from texts that are too long."""
        self._pipe.warn_of_cut([*self.prompts, *([] if self._negative_prompt is None else [self._negative_prompt])])


def drawn_of(
    pipe: ClassToImagePipeline | TextToImagePipeline,
    class_labels: list[int | str] | None,
    prompts: str | None,
    negative_prompt: str | None,
    options: SamplingOptions,
) -> DrawnClasses | DrawnPrompts:
    """Take from a job's options what its pipeline is conditioned on.

    Raises:
        ValueError: if that is missing, or something else is given.
    """
    if isinstance(pipe, TextToImagePipeline):
        if class_labels is not None or prompts is None:
            given = f"class_labels is {class_labels}" if class_labels is not None else "prompts is null"
            raise ValueError(f"{given}; expected prompts alone, a file with one a line, for a pipeline of texts")
        return DrawnPrompts(pipe, prompts, negative_prompt, options)
    for name, value in {"prompts": prompts, "negative_prompt": negative_prompt}.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r}; expected null for a pipeline of classes")
    return DrawnClasses(pipe, class_labels)


def write_prompts(drawn: DrawnClasses | DrawnPrompts, folder: Path) -> None:
    """Keep the prompts beside the images, one a line, by number; say what of them is cut off."""
    if isinstance(drawn, DrawnPrompts):
        drawn.warn_of_cut()
        write_text_whole(folder / "prompts.txt", "".join(f"{prompt}\n" for prompt in drawn.prompts))
