"""Mistakes in what an option names: folders and files that are missing, broken or of another kind. One clear message.

A line of a table is what is given and what the message says of it, besides the option and the value.
"""

import shlex

import pytest

TOKENIZERS = [
    ("{missing}", "expected the folder of a saved VQVAE, or its repository on the hub: no such folder"),
    ("{file}", "it is a file"),
    ("{empty}", "it is empty"),
    ("{pipeline}", "it is a pipeline; there is one in {pipeline}/tokenizer"),
    ("{prior_model}", "has model_type 'nextblock_block_prior', not 'nextblock_vqvae'"),
    ("{tokens}", "it is a folder of tokens"),
    ("{images}", "it has no config.json"),
    ("{tokenizer_text}", "SafetensorError"),
    ("{tokenizer_list}", "config.json holds a list"),
    ("{tokenizer_words}", "vocab_size is 'many'; expected an integer"),
    ("{among_pipes}", "it has no config.json"),
    ("{tokenizer_outsized}", "config.json has 1099511627776 bytes; expected 268435456 at most"),
    ("owner/nothing", "no such folder, and the hub does not answer"),
    ("''", "no such folder"),
]
MORE_TOKENIZERS = [
    ("{missing}/deep", "no such folder"),
    ("a/b/c", "no such folder"),
    ("no..name", "no such folder"),
    ("{tokenizer_no_weights}", "model.safetensors"),
    ("{tokenizer_no_config}", "it has no config.json"),
    ("{tokenizer_cut}", "SafetensorError"),
    ("{tokenizer_blank}", "SafetensorError"),
    ("{tokenizer_pickle}", "unexpected: a"),
    ("{tokenizer_binary}", "config.json is no text in UTF-8"),
    ("{tokenizer_blankjson}", "config.json is damaged"),
    ("{tokenizer_cutjson}", "config.json is damaged"),
    ("{tokenizer_bert}", "has model_type 'bert', not 'nextblock_vqvae'"),
    ("{tokenizer_untyped}", "has model_type None, not 'nextblock_vqvae'"),
    ("{tokenizer_null}", "vocab_size is None; expected an integer"),
    ("{tokenizer_huge}", "vocab_size is 1000"),
    ("{tokenizer_scales}", "scales[2] is 'x'"),
    ("{tokenizer_other}", "misshapen: quantizer.codebook.weight (24, 4), expected (25, 4)"),
    ("{tokenizer_extra}", "no field codes"),
    ("{tokenizer_nan}", "NaN or infinite"),
]
TOKENIZER_OF = [
    "tokenize --data.source folder --data.path {images} --output_dir {new} --cpu true --tokenizer",
    "train-prior --tokens {tokens} {train_prior} --tokenizer",
    "evaluate-tokenizer --data.source folder --data.path {images} --output_dir {new} --cpu true --tokenizer",
]
PIPELINES = [
    ("{missing}", "expected the folder of a pipeline, or its repository on the hub: no such folder"),
    ("{tokenizer}", "it has no model_index.json"),
    ("{pipeline_no_prior}", "prior"),
    ("{pipeline_cut}", "SafetensorError"),
    ("{pipeline_list}", "model_index.json holds a list"),
    ("{pipeline_swapped}", "expected"),
]
MORE_PIPELINES = [
    ("owner/nothing", "the hub does not answer"),
    ("{empty}", "it is empty"),
    ("{file}", "it is a file"),
    ("{images}", "it has no model_index.json"),
    ("{prior_model}", "it has no model_index.json"),
    ("{tokens}", "it is a folder of tokens"),
    ("{pipeline_no_index}", "it has no model_index.json"),
    ("{pipeline_no_weights}", "model.safetensors"),
    ("{pipeline_binary}", "model_index.json is no text in UTF-8"),
    ("{pipeline_blank}", ""),
    ("{pipeline_foreign}", ""),
    ("''", "no such folder"),
]
TOKENS = [
    ("{missing}", "has no manifest.json; expected a folder that `nextblock tokenize` finished"),
    ("{tokenizer}", "has no manifest.json"),
    ("{tokens_binary}", "manifest.json is no text in UTF-8"),
    ("{tokens_no_data}", "is missing; its manifest lists it"),
    ("{tokens_lacking}", "layout"),
]
MORE_TOKENS = [
    ("{empty}", "has no manifest.json"),
    ("{file}", "has no manifest.json"),
    ("{images}", "has no manifest.json"),
    ("{pipeline}", "has no manifest.json"),
    ("{tokens_no_manifest}", "has no manifest.json"),
    ("{tokens_list}", "manifest.json holds"),
    ("{tokens_extra}", "x"),
    ("{tokens_layout}", "layout"),
    ("{tokens_number}", "layout"),
    ("{tokens_splits}", "split"),
    ("{tokens_vocab}", "vocab_size"),
    ("{tokens_version}", "format_version 9; expected 1"),
    ("{tokens_data}", "split"),
    ("{tokens_cut}", "train-00000"),
    ("{tokens_names}", "class_names is [1, 2, 3]; expected a list[str]"),
    ("{tokens_name}", "class_names is 'wren'; expected a list[str]"),
    ("{tokens_few}", "has labels from 0 to 2; expected 0 to 0, as its manifest has 1 class_names"),
    ("''", "manifest.json"),
]
SAMPLES = [
    ("{missing}", "images.npz does not exist; expected what `nextblock sample` writes"),
    ("{samples_text}", "cannot be read: File is not a zip file; expected an .npz file that is whole"),
    ("{samples_names}", "it has no arr_0"),
    ("{samples_size}", "images of 8x8; expected 16x16"),
    ("{samples_labels}", "expected 0 to 2, the pipeline's"),
]
MORE_SAMPLES = [
    ("{file}", "images.npz does not exist"),
    ("{images}", "images.npz does not exist"),
    ("{samples_no_images}", "images.npz does not exist"),
    ("{samples_no_config}", "config.yaml does not exist"),
    ("{samples_blank}", "cannot be read"),
    ("{samples_cut}", "cannot be read"),
    ("{samples_flat}", "holds arrays (6,) of uint8"),
    ("{samples_object}", "arr_0 is an array of Python objects"),
    ("{samples_float}", "of float64 and (6,) of int64; expected (N, H, W, 3) of uint8"),
    ("{samples_none}", "has no images; expected at least 1"),
    ("{samples_length}", "and (5,) of int64; expected (N, H, W, 3)"),
    ("{samples_yaml}", "expected what `nextblock sample` writes"),
    ("''", "images.npz does not exist"),
]
CHECKPOINTS = [
    ("{missing}", "expected a .pth, .pt or .safetensors file"),
    ("{text_pth}", "cannot be read; expected a .pth, .pt or .safetensors file of tensors"),
    ("{pickle_pth}", "cannot be read; expected a .pth, .pt or .safetensors file of tensors"),
    ("{cut_safetensors}", "cannot be read; expected"),
    ("{other_pth}", "the checkpoint lacks the tensors"),
]
MORE_CHECKPOINTS = [
    ("{tokenizer}", "expected a .pth, .pt or .safetensors file"),
    ("{blank_pth}", "EOFError"),
    ("{object_pth}", "expected tensors by name"),
    ("{list_pth}", "holds a list; expected tensors by name"),
    ("{cut_pth}", "cannot be read; expected"),
    ("{text_safetensors}", "cannot be read; expected"),
    ("{blank_safetensors}", "cannot be read; expected"),
    ("''", "expected a .pth, .pt or .safetensors file"),
]
RUNS = [
    ("{missing}", "metrics.jsonl does not exist; expected the output folder of a training"),
    ("{run_no_log}", "metrics.jsonl does not exist; expected the output folder of a training"),
    ("{run_binary}", "expected the output folder of a training"),
    ("{run_recordlist}", "expected the output folder of a training"),
    ("{file}", "metrics.jsonl does not exist"),
    ("{tokens}", "metrics.jsonl does not exist"),
    ("{run_text}", "line 1 is not JSON"),
    ("{run_list}", "expected an object with a step"),
    ("{run_words}", "expected the output folder of a training"),
    ("{run_record}", "expected the output folder of a training"),
]
EVALUATE = "evaluate --data.source folder --data.path {images} --output_dir {new} --cpu true"
EVALUATE += " --pipeline {pipeline} --samples"
DETOKENIZE = "detokenize --output_dir {new} --cpu true --tokenizer {tokenizer} --tokens"
CONVERT = "convert tokenizer --format var --output_dir {new} --scales 1,2,4 --checkpoint"
EXPORT = "export --output_dir {new} --checkpoint"
TAKE_OUT = "convert tokenizer --format var --export --output_dir {new} --checkpoint"
QUICK = [
    ("detokenize --tokens {tokens} --output_dir {new} --cpu true --tokenizer", TOKENIZERS),
    ("sample --output_dir {new} --cpu true --pipeline", PIPELINES),
    (DETOKENIZE, TOKENS),
    (EVALUATE, SAMPLES),
    (CONVERT, CHECKPOINTS),
    ("report", RUNS[:4]),
    (EXPORT, [("{tokenizer}", "checkpoint.json is missing; expected the folder of a checkpoint")]),
]
THOROUGH = [
    ("detokenize --tokens {tokens} --output_dir {new} --cpu true --tokenizer", MORE_TOKENIZERS),
    *((command, TOKENIZERS) for command in TOKENIZER_OF),
    (TAKE_OUT, [*TOKENIZERS[:4], *MORE_TOKENIZERS[-3:]]),
    (TAKE_OUT.replace("tokenizer --", "prior --"), [("{tokenizer}", "nextblock_block_prior")]),
    ("sample --output_dir {new} --cpu true --pipeline", MORE_PIPELINES),
    ("evaluate --samples {samples_good} --output_dir {new} --data.source digits --pipeline", PIPELINES),
    ("demo --pipeline", PIPELINES),
    (DETOKENIZE, [line for line in MORE_TOKENS if line[0] != "{tokens_cut}"]),
    ("train-prior {train_prior} --tokenizer {tokenizer} --tokens", [*TOKENS, *MORE_TOKENS]),
    (EVALUATE, MORE_SAMPLES),
    (CONVERT, MORE_CHECKPOINTS),
    (CONVERT.replace("tokenizer --", "prior --"), [*CHECKPOINTS, *MORE_CHECKPOINTS]),
    ("report", RUNS[4:]),
    (EXPORT, [(f"{{{name}}}", "is missing") for name in ("missing", "file", "images")]),
]


def flat(tables: list) -> list[tuple[str, str, str]]:
    """Return command, what is given, and the words of the message, one after another."""
    return [(command, given, words) for command, lines in tables for given, words in lines]


def check(refusal, places, command: str, given: str, words: str) -> None:
    """Make the mistake, and find the option, what it was given, and what is said of it."""
    text = refusal(f"{command} {given}")
    (value,) = shlex.split(given.format_map(places))
    option = command.split()[-1].removeprefix("--")
    assert ("run_dir" if option == "report" else option) in text
    assert value in text and words.format_map(places) in text


@pytest.mark.parametrize(("command", "given", "words"), flat(QUICK))
def test_what_an_option_names_is_refused_by_its_name(command, given, words, refusal, places):
    check(refusal, places, command, given, words)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "given", "words"), flat(THOROUGH))
def test_more_of_what_options_name(command, given, words, refusal, places):
    if command.startswith("demo"):
        pytest.importorskip("gradio")
    check(refusal, places, command, given, words)
