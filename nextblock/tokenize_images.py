"""Turn images into token shards; a killed job goes on where it was when it is started again.

accelerate launch -m nextblock tokenize --config tokenizer/tokenize-digits --tokenizer DIR …
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState

from nextblock.data.augment import MAX_RATIO, TransformConfig
from nextblock.data.images import ImageDataConfig, load_source, source_files
from nextblock.data.source_record import check_files
from nextblock.data.token_account import check_finished, finish
from nextblock.data.token_jobs import RowDataset, Shard
from nextblock.data.token_shards import damage_of_shard
from nextblock.data.tokens import MANIFEST_NAME, TokenManifest
from nextblock.data.views import ViewSet
from nextblock.data.workers import MAX_WORKERS
from nextblock.files.claim import claimed
from nextblock.files.fingerprints import model_fingerprint, model_options
from nextblock.files.part_jobs import begin_job
from nextblock.prior.text_encoder import TextEncoder
from nextblock.tokenizer.encoder import Encoder, write_shards
from nextblock.tokenizer.modeling_vqvae import VQVAE
from nextblock.training.processes import connect_processes

from .command_line import parse_run_config
from .cpu import MAX_THREADS, fixed_threads, keep_freed_memory
from .inputs import load_given, load_given_encoder
from .progress import Progress
from .run_data import data_of_run
from .stoppable import Job, stoppable_job

# Options of images that came after the first jobs; where they are not used they leave no trace.
_LATER_OPTIONS = ("eval_fraction", "class_names", "first_label", "caption_column")


@dataclass(kw_only=True)
class TokenizeConfig:
    """Encode the training and held-out images of a data set into Parquet shards of indices."""

    tokenizer: str
    """Folder of the tokenizer."""
    output_dir: str
    """Folder of the shards and their manifest; an unfinished one is finished, one of another job refused."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    """Where images come from; the held-out split is encoded too. Not given: what the tokenizer was trained on."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """How the augmented views of training images are made; the original is always a plain center crop. Where neither
    data nor transform are given: as in the tokenizer's training."""
    text_encoder: str | None = None
    """Folder or hub repository of a text model of transformers; features of all captions are then stored with the
    tokens (float16). null stores captions alone; with data.caption_column only."""
    text_max_length: int | None = None
    """Tokens of a caption that the text encoder reads; the rest is cut off. null takes 120, or all that the encoder has
    positions for."""
    num_augmented_views: int = 0
    """Augmented copies of each training image, besides the original."""
    has_flipped_view: bool = False
    """Encode the mirrored center crop of each training image too."""
    ten_crop_ratio: float | None = None
    """Encode ten crops of each training image too, corners and center, plain and mirrored: the shorter side is resized
    to this multiple (1 or more) of the tokenizer's image size first; none with null."""
    min_image_side: int = 1
    """Images with a shorter side under this many pixels are too small."""
    on_error: Literal["stop", "skip"] = "stop"
    """At an image that cannot be used: "stop" the job, or "skip" it and list it in rejected.jsonl."""
    source_check: Literal["names", "files", "content"] = "files"
    """What of the images must be as it was for a job to go on: their "names" and labels; sizes and times of their
    "files" too; or names and the "content" of the files, all of which are then read at start and end. A copy of a
    folder has other times: begin with "content", or go on with "names"."""
    rows_per_shard: int = 65536
    """Rows of a full shard, which is what a killed process loses at most."""
    batch_size: int = 128
    """Images encoded at a time by each process."""
    num_workers: int = 0
    """Processes that decode images, for each encoding process; 0 decodes in the encoding process."""
    num_threads: int = 1
    """CPU threads that each process encodes with; part of the job, because rounding depends on it."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """"bf16" encodes under autocast; the nearest code is searched in float32 either way."""
    is_channels_last: bool = False
    """Lay images out pixel by pixel in memory, which many convolutions are faster with."""
    is_compiled: bool = False
    """Compile the encoder with torch.compile."""
    seed: int = 0
    """Key of the augmentation."""
    cpu: bool = False
    """Encode on the CPU even where there is a GPU."""

    def __post_init__(self):
        for name in ("rows_per_shard", "batch_size", "num_threads", "min_image_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name, most in (("num_threads", MAX_THREADS), ("num_workers", MAX_WORKERS), ("seed", (1 << 63) - 1)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at most {most}")
        for name in ("num_augmented_views", "num_workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        if self.ten_crop_ratio is not None and not 1 <= self.ten_crop_ratio <= MAX_RATIO:
            expected = f"a number from 1 to {MAX_RATIO}, or null"
            raise ValueError(f"ten_crop_ratio is {self.ten_crop_ratio}; expected {expected}")
        for name, values in (
            ("on_error", ("stop", "skip")),
            ("mixed_precision", ("no", "bf16")),
            ("source_check", ("names", "files", "content")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {values}")
        if self.text_encoder is not None and self.data.source is not None and self.data.caption_column is None:
            raise ValueError(f"text_encoder is {self.text_encoder!r}; expected null without data.caption_column")
        if self.data.on_error != "stop":
            raise ValueError(f"data.on_error is {self.data.on_error!r}; expected on_error, which is what a job has")
        # Where data is not given, the transform may be the tokenizer's training's too.
        if self.data.source is not None and self.num_augmented_views and not self.transform.is_random:
            raise ValueError(
                f"num_augmented_views is {self.num_augmented_views} but transform changes nothing at random; "
                "expected 0 views, or a transform"
            )


def tokenize(config: TokenizeConfig) -> bool:
    """Encode a data set, each process its own shards, and write the manifest once all are there.

    Shards that are there already stay, whatever number of processes wrote them; the result is the same to the byte.
    SIGTERM or SIGINT at any process stops all of them at once.

    Args:
        config: the job.

    Returns:
        Whether the job was not stopped.

    Raises:
        ValueError: if the output folder holds another job, the configuration or data does not fit, or an image cannot
            be used while `on_error` is "stop".
    """
    config = _with_data(config)
    state = connect_processes(config.cpu)
    with stoppable_job(state) as stoppable, claimed(Path(config.output_dir), state):
        _tokenize(config, state, stoppable)
        return True
    return False


def _tokenize(config: TokenizeConfig, state: PartialState, stoppable: Job) -> None:
    """Do the job."""
    folder = Path(config.output_dir)
    model = load_given("tokenizer", config.tokenizer, VQVAE, dtype=torch.float32).to(state.device).eval()
    if config.rows_per_shard * model.layout.num_tokens >= 1 << 31:
        raise ValueError(
            f"rows_per_shard is {config.rows_per_shard}; expected under {(1 << 31) // model.layout.num_tokens}, as a "
            f"shard of rows of {model.layout.num_tokens} tokens holds fewer than 2³¹ of them"
        )
    encoder = None
    if config.text_encoder is not None:
        encoder = load_given_encoder("text_encoder", config.text_encoder, config.text_max_length)
        encoder.model.to(state.device)
    plans = _plan(config, model)
    job = _describe(config, model, plans, state, encoder)
    begin_job(folder, job.as_job(), state)
    (folder / "data").mkdir(exist_ok=True)
    num_rows = {folder / "data" / shard.name: len(shard.rows) for _, shards in plans.values() for shard in shards}
    paths = list(num_rows)
    if state.is_main_process:
        for path in filter(Path.is_file, paths):
            problem = damage_of_shard(path, num_rows[path])
            if problem is not None:
                path.unlink()
                print(f"{problem}: written again")
        num_there = sum(path.is_file() for path in paths)
        if num_there < len(paths) or not (folder / MANIFEST_NAME).is_file():
            _check_source(config, plans, is_begun=num_there > 0)
    # Nobody looks before what is damaged is gone.
    state.wait_for_everyone()
    stoppable.done = lambda: f"{sum(path.is_file() for path in paths)} of {len(paths)} shards are in {folder}"
    missing = {
        split: [shard for shard in shards if not (folder / "data" / shard.name).is_file()]
        for split, (_, shards) in plans.items()
    }
    is_finished = (folder / MANIFEST_NAME).is_file() and not any(missing.values())
    # Nobody writes before everybody has looked.
    state.wait_for_everyone()
    if not is_finished:
        with fixed_threads(config.num_threads):
            _write_missing(config, state, model, plans, missing, encoder)
    if state.is_main_process:
        if not is_finished:
            # Nor may images have been replaced while the job was at work.
            _check_source(config, plans, is_begun=True)
        totals = check_finished(folder) if is_finished else finish(folder, job, plans)
        rows = ", ".join(f"{n} rows of {split}" for split, n in totals.items())
        rows += f" of {config.data.path or config.data.source}"
        print(f"{folder}: {rows}" + (", all there already" if is_finished else ""))


def _check_source(
    config: TokenizeConfig, plans: dict[str, tuple[RowDataset, list[Shard]]], *, is_begun: bool
) -> None:
    """Refuse images other than those that the shards there are were made of."""
    if config.source_check == "names":
        return
    hint = "expected the same images: start in a new folder, or go on with source_check 'names' if they are the same"
    for split, (dataset, shards) in plans.items():
        record = Path(config.output_dir, f"source-{shards[0].name.partition('-')[0]}.npz")
        files = source_files(config.data, dataset.source, split)
        check_files(record, *files, config.source_check, is_begun=is_begun, hint=hint)


def _with_data(config: TokenizeConfig) -> TokenizeConfig:
    """Take the images of the tokenizer's training where none are given, and with them how views are made."""
    if config.data.source is not None:
        return config
    data, transform = data_of_run(config.tokenizer)
    if not config.num_augmented_views or config.transform != TransformConfig():
        transform = config.transform
    # What to do at an image that cannot be read is this job's own option.
    return replace(config, data=replace(data, on_error="stop"), transform=transform)


def _plan(config: TokenizeConfig, model: VQVAE) -> dict[str, tuple[RowDataset, list[Shard]]]:
    """Open the splits and cut them into shards."""
    views = _views(config)
    plans: dict[str, tuple[RowDataset, list[Shard]]] = {}
    for split in (config.data.split, config.data.eval_split):
        if split is None or split in plans:
            continue
        num_views = len(views.names) if split == config.data.split else 1
        source = load_source(config.data, split, in_order=True)
        size = (model.config.image_size, config.min_image_side, config.batch_size)
        dataset = RowDataset(source, views, num_views, *size)
        plans[split] = (dataset, Shard.plan(split, len(dataset), config.rows_per_shard))
    names = [shards[0].name.partition("-")[0] for _, shards in plans.values()]
    if len(set(names)) < len(names):
        raise ValueError(f"data.split and data.eval_split would both be written as {names[0]!r}; expected other names")
    return plans


def _views(config: TokenizeConfig) -> ViewSet:
    """The views of a training image."""
    return ViewSet(
        transform=config.transform,
        num_augmented=config.num_augmented_views,
        has_flip=config.has_flipped_view,
        ten_crop_ratio=config.ten_crop_ratio,
        seed=config.seed,
    )


def _describe(
    config: TokenizeConfig,
    model: VQVAE,
    plans: dict[str, tuple[RowDataset, list[Shard]]],
    state: PartialState,
    encoder: TextEncoder | None,
) -> TokenManifest:
    """All that the bytes of the result depend on, without what differs from place to place."""
    # However a dataset is read, its rows are the same. Newer options leave no trace where they are not used, so that
    # older jobs can go on.
    later = {name for name in _LATER_OPTIONS if getattr(config.data, name) is None}
    left_out = {"is_streamed", "on_error", *later}
    data = {name: value for name, value in asdict(config.data).items() if name not in left_out}
    if config.data.path is not None and (config.data.source != "datasets" or Path(config.data.path).exists()):
        data["path"] = None
    return TokenManifest(
        layout=model.layout.to_dict(),
        vocab_size=model.config.vocab_size,
        embedding_dim=model.config.embedding_dim,
        code_bases=[] if model.quantizer.digits is None else list(model.quantizer.digits.bases),
        tokenizer_sha256=model_fingerprint(model),
        image_size=list(model.config.image_size),
        class_names=list(plans[config.data.split][0].source.class_names),
        data=data,
        condition="" if plans[config.data.split][0].source.captions is None else "text",
        text_encoder={} if encoder is None else _described(encoder, config),
        transform=asdict(config.transform),
        num_augmented_views=config.num_augmented_views,
        seed=config.seed,
        views=_views(config).names,
        min_image_side=config.min_image_side,
        rows_per_shard=config.rows_per_shard,
        encoding={
            "device": state.device.type,
            "mixed_precision": config.mixed_precision,
            "is_channels_last": config.is_channels_last,
            "is_compiled": config.is_compiled,
            "batch_size": config.batch_size,
            "num_threads": config.num_threads,
        },
        tokenizer_config=model_options(model),
        splits={
            split: {
                "num_images": len(dataset.source),
                "num_views": dataset.num_views,
                "source_sha256": dataset.fingerprint(),
            }
            for split, (dataset, _) in plans.items()
        },
    )


def _described(encoder: TextEncoder, config: TokenizeConfig) -> dict:
    """What a manifest says of the encoder of captions."""
    name = config.text_encoder if not Path(config.text_encoder).exists() else Path(config.text_encoder).name
    return {
        "name": name,
        "sha256": encoder.fingerprint(),
        "width": encoder.width,
        "max_length": encoder.max_length,
    }


def _write_missing(
    config: TokenizeConfig,
    state: PartialState,
    model: VQVAE,
    plans: dict[str, tuple[RowDataset, list[Shard]]],
    missing: dict[str, list[Shard]],
    text_encoder: TextEncoder | None,
) -> None:
    """Write this process's share of the missing shards; the main process then waits for the others'."""
    folder = Path(config.output_dir) / "data"
    if state.device.type == "cpu":
        keep_freed_memory()
    encoder = Encoder(model, config.mixed_precision == "bf16", config.is_channels_last, config.is_compiled)
    num_rows = sum(len(dataset) for dataset, _ in plans.values())
    num_missing = sum(len(shard.rows) for shards in missing.values() for shard in shards)
    progress = Progress(state, "tokenize", num_rows, num_rows - num_missing)
    for split, shards in missing.items():
        mine = shards[state.process_index :: state.num_processes]
        options = {"num_workers": config.num_workers, "skips_errors": config.on_error == "skip"}
        options["embed"] = None if text_encoder is None else text_encoder.encode_each
        if mine:
            write_shards(folder, mine, plans[split][0], encoder, progress.add, **options)
    progress.finish_share()
    if state.is_main_process:
        awaited = {
            folder / shard.name: f"{folder / shard.name} of rank {number % state.num_processes}"
            for shards in missing.values()
            for number, shard in enumerate(shards)
        }
        progress.wait_for_files(lambda: next((text for path, text in awaited.items() if not path.is_file()), None))
    progress.close()


def main(argv: Sequence[str]) -> None:
    """Read the command line and encode."""
    tokenize(parse_run_config(TokenizeConfig, command="tokenize", argv=argv))
