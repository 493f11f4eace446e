"""Options of `nextblock evaluate`, and which of them go together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nextblock.data.images import ImageDataConfig
from nextblock.evaluation.features import VARIANTS
from nextblock.evaluation.presets import PRESETS
from nextblock.evaluation.report import Aim
from nextblock.evaluation.source_sets import CROPS

from .cpu import MAX_THREADS
from .sweep_config import DrawConfig, Sweep, sample_configs

LAYOUT_NAMES = ("scales", "raster", "rows", "quadrants", "tiles")
# What the table of a judged pipeline shows, in its order; its report holds more.
LABELS = {
    "reconstruction_psnr": "held-out reconstruction PSNR, dB",
    "code_usage": "share of codes used, held-out",
    "code_perplexity": "perplexity of codes, held-out",
    "prior_gain_nats": "prior's held-out loss under ln V, nats",
    "class_accuracy_samples": "class accuracy of samples",
    "frechet_samples_ratio": "Frechet distance of samples over floor",
    "nearest_train_p1_ratio": "nearest training image, samples over held-out",
    "diversity_ratio": "within-class distance, samples over held-out",
}
# Options that mean something beside `features` alone, and beside `pipeline` alone.
_OF_FEATURES = (
    "features_variant", "reference", "reference_split", "reference_crop", "reference_file", "training_images", "preset",
)  # fmt: skip
_OF_PIPELINE = ("requires_own_tokenizer", "run_dirs", "aims")


@dataclass(kw_only=True)
class EvaluateConfig:
    """Measures samples by features of any data: FID and the like; or judges a pipeline of digits; or both.

    With `features`, result.json has every figure under a name of its own; what could not be had is null, and
    NAME_reason says why. With `pipeline`, report.json holds reconstruction, codebook and, of digits, a judge's figures.
    """

    samples: str | None = None
    """Images to measure: an .npz file (`arr_0`, and `arr_1` for classes), a folder of pictures, or what
    `nextblock sample` wrote. Null with a sweep alone, which draws them."""
    output_dir: str
    """Folder that results and pictures go to."""
    features: str | None = None
    """Network whose features figures are taken of: a file of Inception's weights of 2015 (TorchScript, or pytorch-fid's
    state dict, which has class scores too), or a vision model of transformers, by its folder or its id on the hub."""
    features_variant: Literal[VARIANTS] | None = None
    """Whose way of resizing and scaling: "torch-fidelity" (ADM's and StyleGAN's too), "pytorch-fid" or "clean-fid" for
    Inception; "dgm-eval" or "clean-fid" for others. Null takes the first of them."""
    reference: str | None = None
    """What samples are compared with: a folder of pictures, an .npz file of images or of statistics (`mu`, `sigma`),
    "digits", or a dataset on the hub or saved to disk. Null takes the images of data."""
    reference_split: str | None = None
    """Split of a dataset, or of data, that is the reference; null takes data.eval_split, or data.split without one."""
    reference_crop: Literal[CROPS] | None = None
    """How the reference's pictures are brought to the samples' size: "center" as trainings see held-out images, "adm"
    as ADM's loader does; null crops at the center those that are of another size."""
    reference_file: str | None = None
    """File that the reference's features and statistics are kept in, and taken from where they fit; null is
    reference.npz in output_dir."""
    training_images: str | None = None
    """Images that the models were trained on, as a folder or an .npz file, among which the nearest to each sample is
    looked for. Null takes data.split where that is not the reference, or else the reference."""
    preset: Literal[tuple(PRESETS)] | None = None
    """A published protocol; samples, features or a reference that break it are refused."""
    max_features: int = 50_000
    """Images of each set, at most, that are compared one by one (KID, precision and recall, neighbours); the Fréchet
    distance is always of all."""
    seed: int = 0
    """Key of KID's subsets."""
    num_threads: int = 1
    """CPU threads that each process makes features with; rounding depends on it."""
    pipeline: str | None = None
    """Folder of a pipeline to judge by its samples, which `nextblock sample` wrote with output_format npz; with a
    sweep, of the one to draw from."""
    sweep: str | None = None
    """Values of a sampling option, such as guidance_scale=1.0,1.5,2.0: samples are drawn from the pipeline for each and
    measured, in a folder of its own in output_dir, where what is finished stays; sweep.json and sweep.png put the
    figures together."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    """How a sweep draws its samples."""
    requires_own_tokenizer: bool = False
    """Refuse a pipeline whose tokenizer is not the one whose tokens its prior has learned, instead of warning."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    """Images: `split` is what was trained on, `eval_split` what was held out. Not given: with a pipeline, those of the
    tokenizer's training, the first of run_dirs."""
    run_dirs: list[str] = field(default_factory=list)
    """Output folders of the two trainings, the tokenizer's and then the prior's, for curves, held-out loss
    and time; empty leaves these out."""
    aims: dict[str, dict[str, str]] = field(default_factory=dict)
    """For a layout (scales, raster, rows, quadrants or tiles), figures of the pipeline's table and their bounds,
    written as ">= 28.5" or "<= 2.8"."""
    batch_size: int = 100
    """Images read or encoded at a time; no figure of features depends on it."""
    num_pictures: int = 10
    """Originals shown above their reconstructions."""
    cpu: bool = False
    """Compute on the CPU even where there is a GPU."""
    def __post_init__(self):
        for name in ("batch_size", "num_pictures", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive integer")
        for name, least in (("max_features", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected an integer of at least {least}")
        if self.num_threads > MAX_THREADS:
            raise ValueError(f"num_threads is {self.num_threads}; expected at most {MAX_THREADS}")
        self._check_sweep()
        self._check_together()
        if self.judges_pipeline and self.data.eval_split is None:
            raise ValueError("data.eval_split is null; expected the name of the split held out")
        if len(self.run_dirs) not in (0, 2):
            raise ValueError(
                f"run_dirs is {self.run_dirs}; expected two folders, tokenizer's and prior's, or none"
            )
        self._check_aims()

    @property
    def judges_pipeline(self) -> bool:
        """Whether the pipeline is judged, and not only drawn from."""
        return self.pipeline is not None and self.sweep is None

    def _check_sweep(self) -> None:
        """Refuse a sweep that lacks something, or has what belongs to a single set of samples."""
        if self.sweep is None:
            if self.samples is None:
                raise ValueError("samples is null; expected images to measure, or a sweep that draws them")
            if self.draw != DrawConfig():
                raise ValueError("draw says how a sweep draws, but sweep is null; expected both")
            return
        for name in ("pipeline", "features"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is null, but sweep is {self.sweep!r}; expected both")
        for name in ("samples", "run_dirs", "aims"):
            value = getattr(self, name)
            if value:
                raise ValueError(f"{name} is {value!r} and sweep {self.sweep!r}; expected one of them")
        sample_configs(Sweep.parse(self.sweep), self.draw, Path(self.output_dir), pipeline=self.pipeline)

    def _check_together(self) -> None:
        """Refuse options that mean nothing without others."""
        if self.features is None and self.pipeline is None:
            raise ValueError(
                "features is null; expected a file of Inception's weights, or a vision model of transformers; or "
                "pipeline, for a pipeline to be judged"
            )
        for needed, names in (("features", _OF_FEATURES), ("pipeline", _OF_PIPELINE)):
            given = [name for name in names if getattr(self, name) not in (None, False, [], {})]
            if getattr(self, needed) is None and given:
                raise ValueError(f"{given[0]} is {getattr(self, given[0])!r}, but {needed} is null; expected both")
        if self.features is None:
            return
        has_data = self.data.source is not None
        if self.reference is not None and has_data and not self.judges_pipeline:
            raise ValueError(
                f"reference is {self.reference!r} and data.source {self.data.source!r}; expected one of them, since "
                "either is what samples are compared with"
            )
        if self.reference is None and not has_data and not self.run_dirs:
            raise ValueError(
                "reference is null; expected a folder, an .npz file or a dataset that samples are compared with, or "
                "data.source"
            )
        if self.data.is_streamed:
            raise ValueError("data.is_streamed is True; expected False: images are read by several processes")

    def _check_aims(self) -> None:
        """Refuse aims of layouts and figures that there are not."""
        unknown = sorted(set(self.aims) - set(LAYOUT_NAMES))
        if unknown:
            raise ValueError(f"aims names the layouts {unknown}; expected some of {list(LAYOUT_NAMES)}")
        for layout, aims in self.aims.items():
            unknown = sorted(set(aims) - set(LABELS))
            if unknown:
                raise ValueError(f"aims.{layout} names {unknown}; expected figures among {list(LABELS)}")
            for name, text in aims.items():
                try:
                    Aim.parse(text)
                except ValueError as error:
                    raise ValueError(f"aims.{layout}.{name}: {error}") from error
