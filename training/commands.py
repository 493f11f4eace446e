"""The commands of the console script `nextblock`: which module each runs, and how their helps end.

A command is its module's `main(argv)`; `python -m MODULE` runs the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """What a word or two after `nextblock` run.

    Args:
        module: has a `main(argv)`.
        summary: one line for the list of commands.
        example: arguments as typed in a shell; those of all commands fit each other.
    """

    module: str
    summary: str
    example: str


COMMANDS = {
    "train-tokenizer": Command(
        "nextblock.tokenizer.train",
        "train a tokenizer on images",
        "--config tokenizer/digits-scales --output_dir out/tokenizer",
    ),
    "evaluate-tokenizer": Command(
        "nextblock.tokenizer.evaluate",
        "measure a tokenizer on held-out images",
        "--config tokenizer/evaluate-digits --tokenizer out/tokenizer --output_dir out/tokenizer-report",
    ),
    "tokenize": Command(
        "nextblock.tokenizer.tokenize_dataset",
        "turn images into token shards",
        "--config tokenizer/tokenize-digits --tokenizer out/tokenizer --output_dir out/tokens",
    ),
    "verify": Command(
        "nextblock.tokenizer.verify_tokens",
        "check token shards against their manifest",
        "--tokens out/tokens",
    ),
    "detokenize": Command(
        "nextblock.tokenizer.detokenize_dataset",
        "decode token shards to pictures",
        "--tokens out/tokens --tokenizer out/tokenizer --output_dir out/look",
    ),
    "train-prior": Command(
        "nextblock.prior.train",
        "train a prior on tokens or images, and write a pipeline",
        "--config prior/digits-scales --tokens out/tokens --tokenizer out/tokenizer --output_dir out/prior "
        "--pipeline_dir out/pipeline",
    ),
    "report": Command(
        "nextblock.training.report",
        "draw a training run as one page",
        "out/prior --output report.html",
    ),
    "sample": Command(
        "nextblock.pipelines.sample",
        "draw many images from a pipeline",
        "--config pipelines/sample-digits-scales --pipeline out/pipeline --output_dir out/samples",
    ),
    "evaluate": Command(
        "nextblock.pipelines.evaluate",
        "judge a pipeline by its samples and by held-out images",
        "--config pipelines/evaluate-digits --pipeline out/pipeline --samples out/samples --output_dir out/report",
    ),
    "demo": Command(
        "nextblock.pipelines.demo",
        "try a pipeline on a local web page",
        "--pipeline out/pipeline",
    ),
    "convert tokenizer": Command(
        "nextblock.tokenizer.convert_checkpoint",
        "take over a published VAR tokenizer, or export one",
        "--format var --checkpoint vae_ch160v4096z32.pth --output_dir out/var-tokenizer "
        "--scales 1,2,3,4,5,6,8,10,13,16",
    ),
    "convert prior": Command(
        "nextblock.prior.convert_checkpoint",
        "take over a published VAR transformer, or export one",
        "--format var --checkpoint var_d16.pth --output_dir out/var-d16 --scales 1,2,3,4,5,6,8,10,13,16 "
        "--to_pipeline --tokenizer out/var-tokenizer",
    ),
}
_typed_command: ContextVar[str | None] = ContextVar("typed_command", default=None)


@contextmanager
def typed_as(name: str) -> Iterator[None]:
    """Lets what runs inside know that the user typed a command and not `python -m`.

    Args:
        name: among COMMANDS.
    """
    token = _typed_command.set(name)
    try:
        yield
    finally:
        _typed_command.reset(token)


def program_and_example(prog: str) -> tuple[str, str]:
    """Tells what the user typed to run an entry point, and how its help ends.

    Args:
        prog: `python -m MODULE`, by which the entry point knows itself.

    Returns:
        `prog`, or inside `typed_as` the command; and an example with it, empty for a module that no command runs.
    """
    typed = _typed_command.get()
    if typed is not None:
        prog, command = f"nextblock {typed}", COMMANDS[typed]
    else:
        command = next((c for c in COMMANDS.values() if prog == f"python -m {c.module}"), None)
    return prog, "" if command is None else f"example:\n  {prog} {command.example}\n"
