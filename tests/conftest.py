"""Fixtures that several folders' tests share: generated images, a tiny tokenizer with its tokens, trainings.

Trainings run in this process or in two processes, always with deterministic kernels.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASS_NAMES = ("blue tit", "great tit", "wren")
CAPTION_WORDS = "a the red blue green small large bird cat dog of in and".split()
TINY_TOKENIZER = """
    --model.image_size 16 --model.hidden_dim 8 --model.embedding_dim 4 --model.vocab_size 24
    --model.layout scales --model.scales [1,2,4] --model.num_phi 2
    --model.codebook_update ema --model.codebook_ema_decay 0.8 --model.codebook_init data
    --model.revival_threshold 0.3 --transform.max_shift 1 --transform.horizontal_flip true
    --optimizer.learning_rate 1e-3 --loop.cpu true --loop.mixed_precision no --loop.log_every 1
    --loop.num_steps 6 --loop.save_every 3 --loop.batch_size 8
""".split()
TINY_PRIOR = """
    --model.hidden_size 16 --model.num_layers 2 --model.num_heads 2 --class_dropout 0.3
    --num_pictures_per_class 2 --optimizer.learning_rate 1e-3
    --loop.cpu true --loop.mixed_precision no --loop.log_every 1
    --loop.num_steps 6 --loop.save_every 3 --loop.batch_size 8
""".split()
NO_TRACKER = ["--loop.tracker", "null"]
# Two processes that share one import: they run commands one after another, each with a process group of its own.
WORKER = """
import json, os, runpy, shutil, sys
import datasets, diffusers, torch
from accelerate.state import AcceleratorState, GradientState, PartialState
import nextblock.pipelines

child = os.fork()
rank = "1" if child else "0"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
torch.use_deterministic_algorithms(True)
for port, command, arguments in json.loads(sys.argv[1]):
    if command == "copy":
        if rank == "0":
            shutil.copytree(*arguments, ignore=shutil.ignore_patterns("step_00000006"))
        continue
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = ["nextblock", command, *arguments]
    runpy.run_module("nextblock", run_name="__main__", alter_sys=True)
    assert PartialState().num_processes == 2
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def _reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_accelerate():
    """Let a test, and the one after it, choose devices and precision anew."""
    _reset_accelerate()
    yield
    _reset_accelerate()


@pytest.fixture(scope="session")
def full_disk():
    """Let no file grow beyond some size, as on a disk that is full then."""
    import resource

    @contextmanager
    def limit(num_bytes: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture(scope="session")
def run_here():
    """Run an entry point's function in this process, with the configuration of a command line."""
    import torch

    from nextblock.command_line import parse_run_config

    def run(function, config_class, *arguments):
        config = parse_run_config(config_class, command="test", argv=[str(argument) for argument in arguments])
        was_deterministic = torch.are_deterministic_algorithms_enabled()
        _reset_accelerate()
        torch.use_deterministic_algorithms(True)
        try:
            function(config)
        finally:
            torch.use_deterministic_algorithms(was_deterministic)
            _reset_accelerate()
        return config

    return run


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run(command: list[str], cwd: Path) -> tuple[int, str]:
    """Run a command and all that it starts; return its exit status and output."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=900)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.fixture(scope="session")
def run_on_two():
    """Run commands, or copies of folders without the last checkpoint, one after another on two processes."""

    def run(*jobs: tuple[str, list], cwd: Path) -> None:
        numbered = [(_free_port(), command, [str(argument) for argument in arguments]) for command, arguments in jobs]
        status, output = _run([sys.executable, "-c", WORKER, json.dumps(numbered)], cwd)
        assert status == 0, output

    return run


@pytest.fixture(scope="session")
def launch_two():
    """Launch a command on two processes as a user does."""

    def run(command: str, *arguments: str, cwd: Path) -> None:
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launcher += ["--main_process_port", str(_free_port())]
        status, output = _run([sys.executable, "-m", *launcher, "-m", "nextblock", command, *arguments], cwd)
        assert status == 0, output

    return run


def _write_images(folder: Path, count: int, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """16 training and 5 held-out images of each of three classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 5)):
        for name in CLASS_NAMES:
            _write_images(root / split / name, count, rng)
    return root


@pytest.fixture(scope="session")
def plain_image_folder(tmp_path_factory) -> Path:
    """12 training and 4 held-out images without classes."""
    root, rng = tmp_path_factory.mktemp("plain_images"), np.random.default_rng(1)
    for split, count in (("train", 12), ("test", 4)):
        _write_images(root / split, count, rng)
    return root


@pytest.fixture(scope="session")
def captioned_folder(tmp_path_factory) -> Path:
    """12 training and 4 held-out images with one caption or two each, of two to five words."""
    root, rng = tmp_path_factory.mktemp("captioned"), np.random.default_rng(2)
    for split, count in (("train", 12), ("test", 4)):
        _write_images(root / split, count, rng)
        rows = []
        for number in range(count):
            words = rng.choice(CAPTION_WORDS, 2 + number % 4)
            texts = [" ".join(words), "a " + words[0]][: 1 + number % 2]
            rows.append({"file_name": f"{number:02d}.png", "text": texts})
        (root / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="session")
def text_encoder_dir(tmp_path_factory) -> Path:
    """An untrained BERT of width 8 with a tokenizer of whole words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *CAPTION_WORDS]
    folder = tmp_path_factory.mktemp("text_encoder")
    vocabulary = {word: number for number, word in enumerate(words)}
    BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_arguments(image_folder) -> list[str]:
    """What trains a tiny tokenizer with a moving-average codebook and revival for six steps."""
    return [*TINY_TOKENIZER, "--data.source", "folder", "--data.path", str(image_folder)]


@pytest.fixture(scope="session")
def tokenizer_dir(image_folder, tmp_path_factory) -> Path:
    """An untrained tokenizer of 16×16 images whose 24 codes are features of them."""
    import torch

    from nextblock.data.augment import TransformConfig
    from nextblock.data.image_folder import scan_image_folder
    from nextblock.data.images import ImageDataset, collate
    from nextblock.tokenizer import VQVAE, VQVAEConfig

    torch.manual_seed(0)
    sizes = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 24}
    model = VQVAE(VQVAEConfig(**sizes, layout="scales", scales=[1, 2, 4], num_phi=2)).eval()
    images = ImageDataset(scan_image_folder(image_folder, "train"), 16, TransformConfig(), seed=0)
    model.initialize_codebook(collate([images[index] for index in range(len(images))])["pixel_values"], seed=0)
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenize_arguments(image_folder, tokenizer_dir) -> list[str]:
    """What turns the images and two views of each into shards of 40 rows."""
    return [
        *("--tokenizer", str(tokenizer_dir), "--data.source", "folder", "--data.path", str(image_folder)),
        *("--num_augmented_views", "2", "--transform.max_shift", "2", "--transform.horizontal_flip", "true"),
        *("--rows_per_shard", "40", "--batch_size", "16", "--seed", "3", "--cpu", "true"),
    ]


@pytest.fixture(scope="session")
def tokens_dir(tokenize_arguments, run_here, tmp_path_factory) -> Path:
    """The tokens of the generated images."""
    from nextblock.tokenize_images import TokenizeConfig, tokenize

    folder = tmp_path_factory.mktemp("tokens") / "new"
    run_here(tokenize, TokenizeConfig, *tokenize_arguments, "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def prior_arguments(tokens_dir, tokenizer_dir) -> list[str]:
    """What trains a tiny prior on those tokens for six steps."""
    return [*TINY_PRIOR, "--tokens", str(tokens_dir), "--tokenizer", str(tokenizer_dir)]


@pytest.fixture(scope="session")
def two_process_runs(
    tokenizer_arguments, tokenize_arguments, prior_arguments, run_on_two, tmp_path_factory
) -> Path:
    """Folders written by two processes.

    `tokens`; `prior`; and for both stages, with dropout, `…_whole` and `…_resumed` from its checkpoint at step 3.
    """
    root = tmp_path_factory.mktemp("two_processes")
    dropout = {
        "tokenizer": ["--model.num_res_blocks", "1", "--model.dropout", "0.1", "--model.hidden_dim", "16"],
        "prior": ["--model.dropout", "0.1", "--model.drop_path", "0.1"],
    }
    jobs = [("tokenize", [*tokenize_arguments, "--output_dir", root / "tokens"])]
    jobs.append(("train-prior", [*prior_arguments, *NO_TRACKER, *_prior_folders(root / "prior")]))
    for stage, arguments in (("tokenizer", tokenizer_arguments), ("prior", prior_arguments)):
        whole, resumed = root / f"{stage}_whole", root / f"{stage}_resumed"
        folders = _prior_folders if stage == "prior" else lambda folder: ["--output_dir", folder]
        arguments = [*arguments, *dropout[stage], "--loop.gradient_accumulation_steps", "2", *NO_TRACKER]
        jobs.append((f"train-{stage}", [*arguments, *folders(whole)]))
        jobs.append(("copy", [whole, resumed]))
        resume = ["--loop.resume_from_checkpoint", "latest"]
        jobs.append((f"train-{stage}", [*arguments, *folders(resumed), *resume]))
    run_on_two(*jobs, cwd=root)
    return root


def _prior_folders(folder: Path) -> list:
    return ["--output_dir", folder, "--pipeline_dir", folder / "pipeline"]


@pytest.fixture(scope="session")
def read_metrics():
    """Read a run's metrics without its times."""

    def read(run_dir: Path) -> list[dict]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "time/total"} for line in lines]

    return read


@pytest.fixture(scope="session")
def assert_same_state():
    """Compare the tensors that two runs left at a step: weights, weight average, optimizer, bit for bit."""
    import torch
    from safetensors.torch import load_file

    def flat(value, name=""):
        if isinstance(value, dict):
            for key, entry in value.items():
                yield from flat(entry, f"{name}.{key}")
        elif isinstance(value, (list, tuple)):
            for key, entry in enumerate(value):
                yield from flat(entry, f"{name}.{key}")
        else:
            yield name, value

    def compare(run_dir: Path, expected_dir: Path, step: int, atol: float | None = None) -> None:
        for file in ("model.safetensors", "optimizer.bin", "average.safetensors"):
            name = f"checkpoints/step_{step:08d}/{file}"
            read = load_file if file.endswith("safetensors") else torch.load
            got, expected = dict(flat(read(run_dir / name))), dict(flat(read(expected_dir / name)))
            assert got.keys() == expected.keys() and len(got) > 2
            for key, value in expected.items():
                if not isinstance(value, torch.Tensor):
                    assert got[key] == value, f"{name}: {key}"
                elif atol is None:
                    assert torch.equal(got[key], value), f"{name}: {key}"
                else:
                    torch.testing.assert_close(got[key], value, rtol=0, atol=atol, msg=f"{name}: {key}")

    return compare
