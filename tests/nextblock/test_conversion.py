"""The converters' tables: formats are told by names, and options go with their format."""

import re
from typing import get_args, get_type_hints

import pytest
import torch

from nextblock import convert_prior, convert_tokenizer

COMMANDS = {"tokenizer": convert_tokenizer, "prior": convert_prior}
CONFIGS = {
    "tokenizer": convert_tokenizer.ConvertTokenizerConfig,
    "prior": convert_prior.ConvertPriorConfig,
}


@pytest.mark.parametrize("stage", COMMANDS)
def test_the_option_names_the_formats_of_the_table(stage):
    config_class = CONFIGS[stage]
    assert get_args(get_type_hints(config_class)["format"]) == ("auto", *config_class.formats)
    fields = set(config_class.__dataclass_fields__)
    for chosen in config_class.formats.values():
        assert {*chosen.options, *chosen.required, *chosen.export_options} <= fields


@pytest.mark.parametrize("stage", COMMANDS)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], r"the checkpoint is of no format known; expected one of .*: it holds 2 tensors, a, b$"),
        ([f"n{i}" for i in range(20)], r"it holds 20 tensors, n0, n1, .*, n7 …$"),
    ],
)
def test_auto_says_what_it_saw(stage, names, message, tmp_path):
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message) as caught:
        COMMANDS[stage].main(["--checkpoint", str(tmp_path / "x.pth"), "--output_dir", str(tmp_path / "out")])
    assert all(name in str(caught.value) for name in CONFIGS[stage].formats)


@pytest.mark.parametrize("stage", COMMANDS)
def test_auto_is_no_format_to_write(stage, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[stage].main(["--checkpoint", "a", "--output_dir", "b", "--export"])
    assert re.search(r"format is 'auto' with export; expected one of \['var'", capsys.readouterr().err)


@pytest.mark.parametrize("stage", COMMANDS)
def test_auto_looks_at_the_options_of_what_it_finds(stage, tmp_path):
    names = ["encoder.mid.attn_1.qkv.weight", "word_embed.weight"]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="scales is missing; expected sizes such as"):
        COMMANDS[stage].main(["--checkpoint", str(tmp_path / "x.pth"), "--output_dir", str(tmp_path / "out")])
