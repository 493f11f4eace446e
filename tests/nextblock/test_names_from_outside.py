"""Names of splits and classes that YAML, Markdown, HTML or file names would take for something else."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image

from nextblock.command_line import parse_run_config
from nextblock.data.image_folder import scan_image_folder
from nextblock.data.tokens import TokenManifest
from nextblock.evaluation.run_page import html_page
from nextblock.files.quoting import markdown_text
from nextblock.pipelines import ClassToImagePipeline
from nextblock.pipelines.sample_files import PictureFolder
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer import VQVAE
from nextblock.training.run_config import run_config_text
from nextblock.verify import damage_of

SPLITS = [("no", "2024"), ("null", "1e3"), ("a|b <i>x", "day: 'one' \"two\"\n---\n# x"), ("日本", "yes"), ("~!", "all")]
NAMES = ["no", "2024", "null", "a\"b'c", "<b>x", "new\nline", "| pipe |", "# `h`", "yes: [1]", "---", "日\u2028本"]
NAMES += ["-", "~", "*em*", "```", "{}", "&amp;"]


@pytest.fixture
def images(tmp_path):
    """Make an image folder of two splits with a folder for each name."""

    def build(*splits: str) -> Path:
        for split in splits:
            for number, name in enumerate(NAMES):
                path = tmp_path / "images" / split / name / f"{name}.png"
                path.parent.mkdir(parents=True)
                Image.new("RGB", (16, 16), (number, 0, 0)).save(path)
        return tmp_path / "images"

    return build


@pytest.mark.parametrize("splits", SPLITS)
def test_what_a_tokenization_writes_can_be_loaded(images, splits, tokenizer_dir, run_here, tmp_path, monkeypatch):
    root, out = images(*splits), tmp_path / "tokens"
    (root / splits[0] / NAMES[5] / "bad\u2028\u0085.png").write_bytes(b"")
    arguments = ["--tokenizer", tokenizer_dir, "--output_dir", out, "--cpu", "true", "--on_error", "skip"]
    arguments += ["--data.source", "folder", "--data.path", root]
    arguments += [f"--data.split={splits[0]}", f"--data.eval_split={splits[1]}"]
    run_here(tokenize, TokenizeConfig, *arguments)
    assert damage_of(out) == []
    manifest = TokenManifest.load(out)
    assert list(manifest.splits) == list(splits) and manifest.class_names == sorted(NAMES)
    header = yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header == DatasetCard.load(out / "README.md").data.to_dict()
    named = [entry["split"] for entry in header["configs"][0]["data_files"]]
    assert all(isinstance(name, str) for name in named)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = datasets.load_dataset(str(out))
    assert list(loaded) == named and [len(loaded[name]) for name in named] == [len(NAMES)] * 2
    assert loaded[named[0]].features["label"].names == sorted(NAMES)


def test_options_come_back_from_what_a_run_keeps(tmp_path):
    for split, eval_split in SPLITS:
        argv = ["--tokenizer", "x", "--output_dir", "y", "--data.source", "folder", "--data.path", "no"]
        argv += [f"--data.split={split}", f"--data.eval_split={eval_split}"]
        config = parse_run_config(TokenizeConfig, command="test", argv=argv)
        assert (config.data.split, config.data.eval_split, config.data.path) == (split, eval_split, "no")
        (tmp_path / "config.yaml").write_text(run_config_text(config), encoding="utf-8")
        again = parse_run_config(TokenizeConfig, command="test", argv=["--config", str(tmp_path / "config.yaml")])
        assert again == config


def test_a_model_card_stays_a_card(tokenizer_dir, tmp_path):
    tokenizer = VQVAE.from_pretrained(tokenizer_dir)
    sizes = {"vocab_size": 24, "embedding_dim": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
    config = BlockPriorConfig(layout=tokenizer.layout.to_dict(), num_classes=len(NAMES), class_names=NAMES, **sizes)
    recipe = {name: name for name in NAMES}
    pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=BlockPrior(config))
    pipe.save_pretrained(tmp_path, recipe=recipe, metrics={"a|<b>": 1.0})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict()["tags"][0] == "nextblock"
    table = card.text.split("## Recipe")[1].split("## Metrics")[0].strip().split("\n")
    assert len(table) == len(NAMES) + 2 and "<b>" not in card.text
    assert list(ClassToImagePipeline.from_pretrained(tmp_path).prior.conditions.class_names) == NAMES


def test_folders_of_samples_are_in_the_order_of_the_classes(tmp_path):
    labels = np.arange(len(NAMES)).repeat(2)
    files = PictureFolder(tmp_path, labels, len(NAMES), NAMES + [], "png", 95)
    files.write(range(len(labels)), np.zeros((len(labels), 8, 8, 3), np.uint8))
    source = scan_image_folder(tmp_path / "images", "train")
    assert [source.label(i) for i in range(len(source))] == labels.tolist()


def test_a_page_shows_names_as_text(tmp_path):
    run = tmp_path / "<b>run</b>".replace("/", "_")
    (run / "pictures").mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 1.0, "train/<i>": 2.0}) + "\n")
    (run / "alarms.jsonl").write_text(json.dumps({"step": 1, "alarm": "<i>\u2028"}) + "\n")
    (run / "config.yaml").write_text("data: <i>")
    Image.new("RGB", (4, 4)).save(run / "pictures" / "<i>_<i>.png")
    page = html_page(run)
    assert "<i>" not in page and "<b>run" not in page and page.count("&lt;i&gt;") >= 5


def test_markdown_is_quoted_in_one_line():
    assert markdown_text("data/digits_scales-2.png") == "data/digits_scales-2.png"
    assert markdown_text("a|b\n<i>_x_</i>\u2028*") == r"a\|b &lt;i&gt;\_x\_&lt;/i&gt; \*"
    assert markdown_text("caf\udce9") == r"caf\\udce9"
