"""Mistakes in values: of another type, out of range, of no known name, against each other. One clear message.

A line of a table is an option, what it is given, and words of the message besides the option's name.
"""

import pytest

TOKENIZER = "train-tokenizer {train_tokenizer}"
PRIOR = "train-prior --tokens {tokens} --tokenizer {tokenizer} {train_prior}"
SAMPLE = "sample --pipeline {pipeline} --output_dir {new} --cpu true"
TOKENIZE = "tokenize --tokenizer {tokenizer} --data.source folder --data.path {images} --output_dir {new} --cpu true"
DETOKENIZE = "detokenize --tokens {tokens} --tokenizer {tokenizer} --output_dir {new} --cpu true"
EVALUATE = "evaluate --pipeline {pipeline} --samples {samples_good} --data.source folder --data.path {images}"
EVALUATE += " --output_dir {new} --cpu true"
MEASURE = "evaluate-tokenizer --tokenizer {tokenizer} --data.source folder --data.path {images} --output_dir {new}"
HUGE = str(2**80)
QUICK = {
    SAMPLE: [
        ("num_threads", "100000", "expected at most 1024"),
        ("num_threads", "0", "expected a positive integer"),
        ("num_threads", "1.5", "Expected a <class 'int'>"),
        ("batch_size", "99999999999", "expected at most 65536"),
        ("num_images_per_label", str(10**15), "expected at most 100000000 images in all"),
        ("num_images_per_label", HUGE, "expected at most 9223372036854775807"),
        ("seed", "-1", "expected a non-negative integer"),
        ("class_labels", "eleven", "'eleven', but the prior has no class names; expected integers"),
        ("sampling.temperature", ".nan", "expected"),
        ("sampling.top_k", "999", "expected"),
        ("output_format", "gif", "Expected a"),
        ("output_dir", "{file}", "expected a folder, but {file} is a file"),
        ("output_dir", "{pipeline}", "the same as pipeline; expected a folder of its own"),
        ("output_dir", "''", "expected the name of a folder"),
        ("pipelin", "x", "did you mean --pipeline?"),
    ],
    DETOKENIZE: [
        ("split", "x", "has the splits"),
        ("first_row", "999999", "expected under"),
        ("output_dir", "{used}", "expected a new or empty folder"),
    ],
    MEASURE: [("batch_size", HUGE, "expected at most 65536")],
    TOKENIZER: [
        ("eval_batch_size", HUGE, "expected at most 65536"),
        ("model.width_multipliers", f"[1,{HUGE}]", "model.width_multipliers is 1208925819614629174706176; expected at"),
        ("loop.tracker", "wandb", "package wandb is not installed; expected null, or the package: pip install wandb"),
        ("loop.num_workers", "100000", "expected 0 to 256"),
        ("loop.keep_best", "loss", "which evaluations do not measure; expected psnr, codebook/usage"),
    ],
    PRIOR: [
        ("num_pictures_per_class", "10000000", "expected at most 4096"),
        ("loop.keep_best", "psnr", "which evaluations do not measure; expected loss, accuracy"),
    ],
}
THOROUGH = {
    TOKENIZER: [
        ("loop.num_steps", "0", "expected at least 1, or null"),
        ("loop.num_steps", "-3", "expected at least 1, or null"),
        ("loop.num_steps", "1.5", "Expected a <class 'int'>"),
        ("loop.num_steps", "nan", "Expected a <class 'int'>"),
        ("loop.num_steps", "1e999", "Expected a <class 'int'>"),
        ("loop.num_steps", "''", "Expected a <class 'int'>"),
        ("loop.num_steps", "yes", "Expected a <class 'int'>"),
        ("loop.num_steps", "³", "Expected a <class 'int'>"),
        ("loop.batch_size", "50000", "expected 1 to 48"),
        ("loop.batch_size", "[1,2]", "Expected a <class 'int'>"),
        ("loop.num_workers", "-1", "expected 0 to 256"),
        ("loop.seed", "-1", "expected 0 to 2147483647"),
        ("loop.seed", HUGE, "expected 0 to 2147483647"),
        ("loop.ema_decay", "2", "expected a number in (0, 1), or null"),
        ("loop.ema_decay", ".nan", "expected a number in (0, 1), or null"),
        ("loop.tracker", "nothing", "Expected a"),
        ("loop.tracker", "3", "Expected a"),
        ("loop.resume_from_checkpoint", "{missing}", "checkpoint.json is missing"),
        ("loop.resume_from_checkpoint", "{file}", "checkpoint.json is missing"),
        ("loop.init_from", "{missing}", "expected the folder of a saved nextblock_vqvae"),
        ("loop.init_from", "{file}", "expected the folder of a saved nextblock_vqvae"),
        ("loop.init_from", "{prior_model}", "expected the folder of a saved nextblock_vqvae"),
        ("loop.init_from", "{tokenizer_binary}", "no text in UTF-8"),
        ("loop.init_from", "{tokenizer_list}", "expected the folder of a saved nextblock_vqvae"),
        ("loop.init_from", "{tokenizer_words}", "vocab_size is"),
        ("loop.init_except", "[a]", "without init_from"),
        ("loop.mixed_precision", "fp16", "expected 'bf16' or 'no' on a CPU"),
        ("loop.mixed_precision", "fp8", "Expected a"),
        ("loop.cpu", "maybe", "Expected a <class 'bool'>"),
        ("loop.num_epochs", "5", "expected one of them, the other null"),
        ("loop.save_every", "0", "expected at least 1, or null"),
        ("loop.usage_alarm", "-1", "expected a number in (0, 1], or null"),
        ("loop", "3", "holds a int; expected names with values"),
        ("loop", "{missing}", "holds a str; expected names with values"),
        ("loop", "{yaml_binary}", "is no text in UTF-8"),
        ("data.path", "{missing}", "expected a folder of images"),
        ("data.path", "{images_text}", ""),
        ("data.path", "{images_none}", ""),
        ("data.path", "{tokens}", ""),
        ("data.split", "nothing", "is not a sub-folder"),
        ("data.eval_split", "nothing", "is not a sub-folder"),
        ("data.eval_fraction", "1", "expected a number between 0 and 1, or null"),
        ("data.eval_fraction", ".nan", "expected a number between 0 and 1, or null"),
        ("data.class_names", "[1,2,3]", "expected names by label"),
        ("data.class_names", "[a]", "1 names for 3 classes; expected as many"),
        ("data.class_names", "{missing}", "is no file; expected names by label"),
        ("data.class_names", "{yaml_binary}", "no text in UTF-8"),
        ("data.source", "digits", "takes no path"),
        ("data.source", "x", "Expected a"),
        ("data.first_label", "-1", "expected 0 or more, or null"),
        ("output_dir", "{file}/x", "expected a folder, but {file} is a file"),
        ("output_dir", "{images}/train/run", "within data.path"),
        ("optimizer.learning_rate", ".nan", "expected a number above 0"),
        ("optimizer.learning_rate", "1e999", "expected a number above 0"),
        ("optimizer.weight_decay", ".nan", "expected a number of at least 0"),
        ("optimizer.nothing", "1", "did you mean --"),
        ("model.scales", "[1,2,3]", "expected"),
        ("model.vocab_size", "0", "expected"),
        ("model.image_size", "15", "expected"),
        ("modle.vocab_size", "3", "did you mean --model.vocab_size"),
    ],
    PRIOR: [
        ("tokens", "null", "expected exactly one of them"),
        ("tokenizer_dtype", "bfloat16", "expected 'float32' with tokens"),
        ("loss_chunk_size", "0", "expected at least 1, or null"),
        ("class_dropout", ".nan", "expected a number in [0, 1]"),
        ("eval_batch_size", "0", "expected at least 1"),
        ("sampling.top_k", "999", "expected"),
        ("sampling.guidance_scale", ".nan", "expected"),
        ("model.num_heads", "3", "expected"),
        ("pipeline_dir", "{file}", "expected a folder, but {file} is a file"),
        ("pipeline_dir", "''", "expected the name of a folder"),
        ("pipeline_dir", "{tokens}", "the same as tokens; expected a folder of its own"),
        ("pipeline_dir", "{tokenizer}", "the same as tokenizer; expected a folder of its own"),
        ("loop.init_from", "{tokenizer}", "expected the folder of a saved nextblock_block_prior"),
        ("loop.init_from", "{missing}", "expected the folder of a saved nextblock_block_prior"),
        ("loop.tracker", "wandb", "pip install wandb"),
        ("tokenizer", "{tokenizer_strange}", "of the tokenizer that made"),
    ],
    SAMPLE: [
        ("num_threads", "-1", "expected a positive integer"),
        ("num_threads", HUGE, "expected at most 1024"),
        ("seed", "x", "Expected a <class 'int'>"),
        ("batch_size", "0", "expected a positive integer"),
        ("class_labels", "99", "99"),
        ("class_labels", "-1", "-1"),
        ("class_labels", "[]", "expected at least one class"),
        ("class_labels", "''", ""),
        ("class_labels", "1.5", ""),
        ("sampling.temperature", "0", "expected"),
        ("sampling.temperature", "-1", "expected"),
        ("sampling.guidance_scale", ".inf", "expected"),
        ("sampling.top_p", "2", "expected"),
        ("sampling.top_k", "-1", "expected"),
        ("image_quality", "0", "expected 1 to 100"),
        ("num_images_per_label", "0", "expected a positive integer"),
        ("dtype", "int8", "Expected a"),
        ("output_dir", "{used}", "expected a new folder"),
        ("nothing", "1", "did you mean --"),
    ],
    TOKENIZE: [
        ("num_threads", "100000", "expected at most 1024"),
        ("num_workers", "100000", "expected at most 256"),
        ("num_workers", "-1", "expected at least 0"),
        ("rows_per_shard", "9999999999", "expected under"),
        ("num_augmented_views", "2", "expected 0 views, or a transform"),
        ("ten_crop_ratio", "1e300", "expected a number from 1 to 16, or null"),
        ("on_error", "x", "Expected a"),
        ("seed", HUGE, "expected at most"),
        ("data.path", "{missing}", "expected a folder of images"),
        ("output_dir", "{tokenizer}", "the same as tokenizer; expected a folder of its own"),
        ("output_dir", "{images}", "within data.path"),
        ("mixed_precision", "fp16", "Expected a"),
    ],
    DETOKENIZE: [
        ("num_images", "0", "expected at least 1"),
        ("first_row", "-1", "expected at least 0"),
        ("output_dir", "{file}/x", "expected a folder, but {file} is a file"),
        ("output_dir", "{tokens}", "the same as tokens; expected a folder of its own"),
    ],
    EVALUATE: [
        ("run_dirs", "[a]", "expected two folders"),
        ("run_dirs", "[{missing},{missing}]", "metrics.jsonl does not exist"),
        ("aims", "'{{x: {{psnr: 1}}}}'", ""),
        ("aims", "'{{scales: {{psnr: \">= 1\"}}}}'", "expected figures among"),
        ("aims", "'{{scales: {{code_usage: x}}}}'", ""),
        ("aims", "3", "Expected a"),
        ("batch_size", "0", "expected a positive integer"),
        ("data.eval_split", "null", "expected the name of the split held out"),
        ("output_dir", "{samples_good}", "the same as samples; expected a folder of its own"),
    ],
    MEASURE: [
        ("split", "x", "is not a sub-folder"),
        ("num_pictures", "0", "expected a positive integer"),
        ("data.path", "{images_cut}", "cannot read"),
    ],
    "demo --pipeline {pipeline}": [
        ("port", "0", "expected 1 to 65535"),
        ("port", "x", "Expected a"),
        ("host", "nowhere.invalid", "expected an address of this machine and a free port"),
        ("dtype", "int8", "Expected a"),
    ],
    "convert tokenizer --format var --checkpoint {other_pth} --output_dir {new} --scales 1,2": [
        ("scales", "x", "expected sizes such as"),
        ("scales", "1,,2", "expected sizes such as"),
        ("format", "vqgan", "Expected a"),
        ("export", "maybe", "Expected a <class 'bool'>"),
    ],
    "convert prior --format var --checkpoint {other_pth} --output_dir {new} --scales 1,2": [
        ("to_pipeline", "true", "expected both or neither"),
        ("tokenizer", "{tokenizer}", "expected both or neither"),
        ("class_names", "{missing}", "expected a file with names"),
        ("class_names", "{yaml_binary}", "no text in UTF-8"),
    ],
    "report {run_good}": [
        ("output", "{new}.pdf", "expected a name that ends in .html or .png"),
        ("output", "{missing}/x.html", "expected a file in a folder that is there"),
        ("outptu", "x", "unrecognized arguments"),
    ],
    "init {images}": [
        ("output_dir", "{file}", "expected a folder, but {file} is a file"),
        ("output_dir", "{file}/x", "expected a folder, but {file} is a file"),
        ("outptu", "x", "unrecognized arguments"),
    ],
}


def flat(tables: dict) -> list[tuple[str, str, str, str]]:
    """Return command, option, value and the words of the message, one after another."""
    return [(command, *line) for command, lines in tables.items() for line in lines]


def check(refusal, places, command: str, option: str, value: str, words: str) -> None:
    """Make the mistake, and find the option's own name, or a file that it names, and the words."""
    text = refusal(f"{command} --{option}={value}")
    assert option.rpartition(".")[2] in text or value.format_map(places) in text
    assert words.format_map(places) in text


@pytest.mark.parametrize(("command", "option", "value", "words"), flat(QUICK))
def test_a_wrong_value_is_refused_by_its_name(command, option, value, words, refusal, places):
    check(refusal, places, command, option, value, words)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option", "value", "words"), flat(THOROUGH))
def test_more_wrong_values(command, option, value, words, refusal, places):
    if command.startswith("demo"):
        pytest.importorskip("gradio")
    check(refusal, places, command, option, value, words)
