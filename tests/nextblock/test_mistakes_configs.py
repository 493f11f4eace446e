"""Mistakes in files of options, in the words of a command line, and in what stands on it twice. One clear message."""

import os
import subprocess
import sys

import pytest

from nextblock.commands import COMMANDS
from nextblock.config_files import check_options_text

FILES = [
    ("binary", "is no text in UTF-8"),
    ("latin", "is no text in UTF-8"),
    ("self", "an alias refers to what it lies in"),
    ("selflist", "an alias refers to what it lies in"),
    ("list", "holds a list; expected names with values"),
    ("scalar", "holds a str; expected names with values"),
    ("number", "holds a int; expected names with values"),
    ("twice", "['output_dir'] given twice; expected once"),
    ("twiceinside", "['num_steps'] given twice; expected once"),
    ("tab", "cannot start any token"),
    ("open", "expected ',' or '}'"),
    ("tag", "could not determine a constructor for the tag"),
    ("anchor", "found undefined alias 'nothing'"),
    ("documents", "but found another document"),
    ("deep", "recursion"),
    ("bomb", "values by its aliases; expected"),
]
CONTENTS = [
    ("intkey", "Key must be a string, got: 1"),
    ("misspelt", "did you mean --loop.num_steps?"),
    ("group", "Expected options"),
    ("groupfile", "loop is '/dev/zero'; expected options by name"),
    ("groupinside", "discriminator.optimizer is '/dev/zero'; expected options by name"),
    ("groupdotted", "discriminator.optimizer is '/dev/zero'; expected options by name"),
    ("class", "Importing 'this.Config' is not allowed"),
    ("null", 'Parser key "loop.num_workers"'),
    ("text", 'Parser key "loop.batch_size"'),
    ("names", "class_names"),
]
# Command lines whose words are wrong, and what is said of them.
WORDS = [
    ("sample", "the following arguments are required: pipeline, output_dir"),
    ("sample --pipeline", "expected one argument"),
    ("sample {pipeline}", "unrecognized arguments: {pipeline}"),
    ("verify {tokens}", "unrecognized arguments"),
    ("config a b", "unrecognized arguments: b"),
    ("config nothing", "'nothing' is no shipped config; expected one of"),
    ("report", "the following arguments are required: run_dir"),
    ("init", "the following arguments are required: images"),
    ("init {missing}", "is not a folder; expected a folder of images"),
    ("init {file}", "is not a folder; expected a folder of images"),
    ("init {empty}", "holds no images; expected images"),
    ("init {images_text}", "none of the pictures looked at can be opened; expected images"),
    ("sample --config nowhere", "'nowhere' is neither a file nor a shipped config"),
    ("sample --config {empty}", "is neither a file nor a shipped config"),
    ("convert nothing", "'convert nothing' is no command; did you mean"),
    ("trian-prior", "did you mean 'train-prior'?"),
    ("convert tokenizer --format var --checkpoint x --output_dir {new}", "scales is missing; expected sizes such as"),
    ("evaluate --pipeline {pipeline} --samples {samples_good} --output_dir {new}", "expected --data.source folder"),
    ("tokenize --tokenizer {tokenizer} --output_dir {new}", "expected --data.source folder"),
    ("train-prior {train_prior} --tokenizer {tokenizer}", "expected exactly one of them"),
    ("export --checkpoint {missing}", "the following arguments are required: output_dir"),
]


@pytest.mark.parametrize(("name", "words"), FILES)
def test_a_file_that_can_hold_no_options_is_named(name, words, refusal, places):
    text = refusal(f"verify --config {{yaml_{name}}}")
    assert text.startswith("error: --config: ") and places[f"yaml_{name}"] in text and words in text


@pytest.mark.parametrize(("name", "words"), CONTENTS)
def test_a_wrong_option_in_a_file_is_named(name, words, refusal):
    assert words in refusal(f"train-tokenizer --output_dir {{new}} --config {{yaml_{name}}}")


def test_a_class_that_options_name_is_not_imported(refusal):
    for given in ("this.Config", "'{{class_path: this.Config}}'", "{yaml_class}"):
        for option in ("train-tokenizer --loop", "train-tokenizer --discriminator.optimizer", "train-prior --data"):
            refusal(option + " " + given + " --output_dir {new}")
    assert "this" not in sys.modules


@pytest.mark.parametrize(("typed", "words"), WORDS)
def test_wrong_words_are_said(typed, words, refusal, places):
    assert words.format_map(places) in refusal(typed)


def test_yaml_that_is_good_is_taken():
    check_options_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\nd: [*a, *a]\n", "good.yaml", {"a.x"})
    check_options_text("", "blank.yaml", {"a"})


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("init", "report", "config")])
def test_every_command_refuses_such_files(command, refusal):
    for name, words in FILES:
        assert words in refusal(f"{command} --config {{yaml_{name}}}")
    assert "did you mean" in refusal(f"{command} --output_dirr x")


@pytest.mark.slow
def test_a_mistake_that_all_processes_make_is_said_once(tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, "--main_process_port", "0", "-m", "nextblock", "sample", "--pipelin", "x"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and not any(tmp_path.iterdir())
    assert (done.stdout + done.stderr).count("unrecognized arguments: --pipelin x; did you mean --pipeline?") == 1
