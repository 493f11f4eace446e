"""The commands of `nextblock`: which module each runs, and how their helps end.

A command is its module's `main(argv)`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """What a word or two after `nextblock` run.

    Args:
        module: of this package; has a `main(argv)`.
        summary: one line for the list of commands.
        example: arguments as typed in a shell; those of all commands fit each other.
    """

    module: str
    summary: str
    example: str


COMMANDS = {
    "init": Command(
        "init_configs",
        "write configs for a folder of your own pictures",
        "my_images --output_dir my-configs",
    ),
    "train-tokenizer": Command(
        "train_tokenizer",
        "train a tokenizer on images",
        "--config tokenizer/digits-scales --output_dir out/tokenizer",
    ),
    "evaluate-tokenizer": Command(
        "evaluate_tokenizer",
        "measure a tokenizer on held-out images",
        "--config tokenizer/evaluate-digits --tokenizer out/tokenizer --output_dir out/tokenizer-report",
    ),
    "tokenize": Command(
        "tokenize_images",
        "turn images into token shards",
        "--config tokenizer/tokenize-digits --tokenizer out/tokenizer --output_dir out/tokens",
    ),
    "verify": Command(
        "verify",
        "check token shards against their manifest",
        "--tokens out/tokens",
    ),
    "detokenize": Command(
        "detokenize",
        "decode token shards to pictures",
        "--tokens out/tokens --tokenizer out/tokenizer --output_dir out/look",
    ),
    "train-prior": Command(
        "train_prior",
        "train a prior on tokens or images, and write a pipeline",
        "--config prior/digits-scales --tokens out/tokens --tokenizer out/tokenizer --output_dir out/prior "
        "--pipeline_dir out/pipeline",
    ),
    "export": Command(
        "export",
        "make a model folder, or a pipeline, of a checkpoint",
        "--checkpoint out/prior/checkpoints/step_00000300 --tokenizer out/tokenizer --output_dir out/step-300",
    ),
    "report": Command(
        "report",
        "draw a training run as one page",
        "out/prior --output report.html",
    ),
    "sample": Command(
        "sample",
        "draw many images from a pipeline",
        "--config pipelines/sample-digits-scales --pipeline out/pipeline --output_dir out/samples",
    ),
    "evaluate": Command(
        "evaluate",
        "measure samples, FID and the like, or judge a pipeline by them",
        "--samples out/samples --reference my_images --features facebook/dinov2-base --output_dir out/figures",
    ),
    "config": Command(
        "show_config",
        "print where a shipped config lies, or list them",
        "accelerate/multi-gpu",
    ),
    "demo": Command(
        "demo",
        "try a pipeline on a local web page",
        "--pipeline out/pipeline",
    ),
    "convert tokenizer": Command(
        "convert_tokenizer",
        "take over a published tokenizer, or export one",
        "--format var --checkpoint vae_ch160v4096z32.pth --output_dir out/var-tokenizer "
        "--scales 1,2,3,4,5,6,8,10,13,16",
    ),
    "convert prior": Command(
        "convert_prior",
        "take over a published prior, or export one",
        "--format var --checkpoint var_d16.pth --output_dir out/var-d16 --scales 1,2,3,4,5,6,8,10,13,16 "
        "--to_pipeline --tokenizer out/var-tokenizer",
    ),
}


def example_text(command: str) -> str:
    """Return how the help of a command ends; nothing for a name that is not among COMMANDS."""
    return f"example:\n  nextblock {command} {COMMANDS[command].example}\n" if command in COMMANDS else ""
