"""A pipeline from anybody: no code that lies in its folder, or that it names, is run by loading it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel

from nextblock.__main__ import main
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import BlockPrior
from nextblock.tokenizer import VQVAE

PLACES = [
    "evil.py",
    "pipeline.py",
    "modeling_evil.py",
    "prior/evil.py",
    "prior/modeling_evil.py",
    "tokenizer/modeling_evil.py",
    "tokenizer/configuration_evil.py",
    "tokenizer/custom_generate/generate.py",
]
AUTO_MAP = {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"}


@pytest.fixture
def folder(build_pipeline, tmp_path, monkeypatch) -> Path:
    """A pipeline full of modules that leave a trace, beside which python is started."""
    build_pipeline().save_pretrained(tmp_path / "pipe")
    for place in PLACES:
        path = tmp_path / "pipe" / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'trace')!r}).touch()\nclass Evil: pass\n")
    monkeypatch.chdir(tmp_path / "pipe")
    monkeypatch.syspath_prepend(str(tmp_path / "pipe"))
    yield tmp_path / "pipe"
    assert not (tmp_path / "trace").exists()
    assert not {"evil", "modeling_evil"} & sys.modules.keys()


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"prior": ["modeling_evil", "Evil"]},
        {"prior": ["evil", "Evil"]},
        {"tokenizer": ["configuration_evil", "Evil"]},
        {"prior": ["antigravity", "fly"]},
        {"prior": ["os", "system"]},
        {"_class_name": ["pipeline", "Evil"]},
        {"_class_name": ["evil", "ClassToImagePipeline"]},
    ],
)
def test_modules_that_the_index_names_are_not_imported(folder, fields):
    change(folder / "model_index.json", **fields)
    for pipeline_class in (ClassToImagePipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match="must be executed|has not been imported|cannot be loaded"):
            pipeline_class.from_pretrained(folder)


def test_modules_beside_a_pipeline_that_names_none_are_passed_over(folder):
    change(folder / "model_index.json", evil=["evil", "Evil"])
    for pipeline_class in (ClassToImagePipeline, DiffusionPipeline):
        assert pipeline_class.from_pretrained(folder).prior.conditions.num_classes == 3


@pytest.mark.parametrize("model_class", [VQVAE, BlockPrior])
def test_modules_that_a_config_names_are_not_imported(folder, model_class):
    place = folder / ("tokenizer" if model_class is VQVAE else "prior")
    change(place / "config.json", auto_map=AUTO_MAP, architectures=["evil.Evil"], custom_pipelines={"x": "evil.Evil"})
    assert type(model_class.from_pretrained(place)) is model_class
    assert type(AutoModel.from_pretrained(place)) is model_class
    ClassToImagePipeline.from_pretrained(folder)
    change(place / "config.json", model_type="evil")
    model_class.from_pretrained(place)
    for fields in (
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"trust_remote_code": True},
        {"dtype": "os.system"},
        {"quantization_config": "evil"},
    ):
        before = (place / "config.json").read_text()
        change(place / "config.json", **fields)
        for load in (model_class.from_pretrained, lambda place: ClassToImagePipeline.from_pretrained(place.parent)):
            with pytest.raises(ValueError, match=next(iter(fields))):
                load(place)
        (place / "config.json").write_text(before)


def test_pickled_weights_are_not_read(folder):
    from ..training.poison import poisons

    for name in ("prior/model.safetensors", "tokenizer/model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(poisons(folder.parent / "trace")["zip"])
        with pytest.raises(Exception, match="[Hh]eader"):
            ClassToImagePipeline.from_pretrained(folder)
        (folder / name).unlink()
        (folder / name).with_name("pytorch_model.bin").write_bytes(poisons(folder.parent / "trace")["zip"])
        with pytest.raises(OSError, match="safetensors"):
            ClassToImagePipeline.from_pretrained(folder)
        (folder / name).write_bytes(content)


def test_commands_end_with_one_message(folder, tmp_path, capsys):
    change(folder / "model_index.json", prior=["evil", "Evil"])
    with pytest.raises(SystemExit) as ended:
        main(["sample", "--pipeline", str(folder), "--output_dir", str(tmp_path / "out"), "--cpu", "true"])
    assert ended.value.code == 2 and "nextblock sample: error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{"vocab_size": 1 << 30}, {"num_layers": 50, "hidden_size": 4096}])
def test_a_config_that_asks_for_more_than_the_weights_hold_is_refused_before_memory_is_taken(folder, fields):
    change(folder / "prior" / "config.json", **fields)
    with pytest.raises(ValueError, match=r"weights stored are not those of the BlockPrior configured:\n  missing or"):
        BlockPrior.from_pretrained(folder / "prior", dtype=torch.float32)
