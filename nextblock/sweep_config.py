"""What a sweep of `nextblock evaluate` tries, and how its samples are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from nextblock.prior.sampling import GivenSamplingOptions, SamplingOptions

from .sample import SampleConfig

# Options whose values are numbers.
SWEPT = ("guidance_scale", "guidance_power", "temperature", "top_k", "top_p", "min_p")


@dataclass(kw_only=True)
class DrawConfig:
    """How a sweep draws its samples."""

    num_images_per_label: int = 10
    """Images of each class or prompt, for each value."""
    class_labels: list[int | str] | int | str | None = None
    """Class or classes to draw, by number or by name; null draws every class, or an unconditional model's images."""
    prompts: str | None = None
    """File with a prompt a line, for a pipeline of texts."""
    negative_prompt: str | None = None
    """What guidance leads away from, of a pipeline of texts; null leads away from no text."""
    sampling: GivenSamplingOptions = field(default_factory=GivenSamplingOptions)
    """How tokens are drawn but for the option that is swept; null takes what the pipeline was saved with."""
    seed: int = 0
    """Key of all random numbers, the same for each value."""
    batch_size: int = 100
    """Images drawn at a time by each process."""
    num_threads: int = 1
    """CPU threads that each process draws with."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the models; the quantizer stays in float32."""


@dataclass(frozen=True)
class Sweep:
    """The values of an option that are tried.

    Args:
        option: one of `SWEPT`.
        values: at least one, all different.
    """

    option: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Read "guidance_scale=1.0,1.25".

        Raises:
            ValueError: if the text is not of that kind, or a value is not in the option's range.
        """
        option, _, listed = text.partition("=")
        option = option.strip()
        if option not in SWEPT:
            raise ValueError(f"sweep is {text!r}; expected NAME=VALUE,VALUE,… with one of {list(SWEPT)}")
        number = {each.name: type(each.default) for each in fields(SamplingOptions)}[option]
        try:
            values = tuple(number(value) for value in listed.split(","))
        except ValueError as error:
            raise ValueError(f"sweep is {text!r}; expected numbers such as {option}=1,2: {error}") from error
        if len(set(values)) < len(values):
            raise ValueError(f"sweep is {text!r}; expected each value once")
        for value in values:
            try:
                SamplingOptions(**{option: value})
            except ValueError as error:
                raise ValueError(f"sweep is {text!r}: {error}") from error
        return cls(option, values)

    def folder(self, output_dir: Path, value: float) -> Path:
        """Return the folder of a value, such as `guidance_scale=1.25`."""
        return output_dir / f"{self.option}={value!r}"


def sample_configs(sweep: Sweep, draw: DrawConfig, output_dir: Path, **options) -> list[SampleConfig]:
    """Say what is drawn for each value.

    Args:
        sweep: the values.
        draw: how.
        output_dir: of the sweep.
        options: others of `SampleConfig`, `pipeline` among them.

    Returns:
        A job for each value, in the folder `samples` of the value's own.

    Raises:
        ValueError: if the options are out of range, or set what is swept.
    """
    given = getattr(draw.sampling, sweep.option)
    if given is not None:
        raise ValueError(f"draw.sampling.{sweep.option} is {given}; expected null, as sweep says what it is")
    shared = {each.name: getattr(draw, each.name) for each in fields(draw) if each.name != "sampling"} | options
    try:
        return [
            SampleConfig(
                output_dir=str(sweep.folder(output_dir, value) / "samples"),
                sampling=replace(draw.sampling, **{sweep.option: value}),
                **shared,
            )
            for value in sweep.values
        ]
    except ValueError as error:
        raise ValueError(f"draw.{error}") from error
