"""A path that is no UTF-8 ends no command, and what a run keeps of it can be read."""

import json
import os
import shutil
import sys

import yaml

from nextblock.evaluation.run_page import write_report
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer.task import TokenizerTrainConfig
from nextblock.train_tokenizer import train


def test_the_path_of_the_data_is_no_utf_8(
    image_folder, tokenizer_dir, tokenizer_arguments, run_here, tmp_path, monkeypatch
):
    data = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.copytree(image_folder, data)
    run, source = tmp_path / "run", ["--data.source", "folder", "--data.path", data]
    monkeypatch.setattr(sys, "orig_argv", ["nextblock", *source])
    options = ["--loop.num_steps", 1, "--loop.tracker", "tensorboard", "--output_dir", run]
    run_here(train, TokenizerTrainConfig, *tokenizer_arguments, *source, *options)
    run_here(
        train, TokenizerTrainConfig, *tokenizer_arguments, *source, *options, "--loop.resume_from_checkpoint", "latest"
    )
    (start, _) = json.loads((run / "run.json").read_text(encoding="utf-8"))["starts"]
    assert "caf\udce9" in start["command"]
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["path"] == data
    write_report(run, tmp_path / "report.html")
    assert "caf\\udce9" in (tmp_path / "report.html").read_text(encoding="utf-8")
    job = ["--tokenizer", tokenizer_dir, "--output_dir", tmp_path / "tokens", "--cpu", "true"]
    run_here(tokenize, TokenizeConfig, *job, *source)
    assert (tmp_path / "tokens" / "manifest.json").is_file()
