"""Tokenization of captioned images: shards keep captions and features of them, and the manifest says so."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM, PreTrainedTokenizerFast

from nextblock.data.images import ImageDataConfig, load_source
from nextblock.data.tokens import TokenDataset, TokenManifest
from nextblock.prior.text_encoder import load_text_encoder
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.verify import damage_of


@pytest.fixture(scope="module")
def tokenize_captions(run_here, captioned_folder, tokenizer_dir):
    """Tokenize the captioned images in this process."""

    def run(output_dir, *options) -> TokenManifest:
        data = ["--data.source", "folder", "--data.path", captioned_folder, "--data.caption_column", "text"]
        sizes = ["--rows_per_shard", 7, "--batch_size", 4, "--has_flipped_view", "true", "--cpu", "true"]
        where = ["--tokenizer", tokenizer_dir, "--output_dir", output_dir]
        run_here(tokenize, TokenizeConfig, *where, *data, *sizes, *options)
        return TokenManifest.load(output_dir)

    return run


@pytest.fixture(scope="module")
def featured_dir(tokenize_captions, text_encoder_dir, tmp_path_factory):
    """Tokens with captions and features of them."""
    folder = tmp_path_factory.mktemp("featured") / "tokens"
    tokenize_captions(folder, "--text_encoder", text_encoder_dir, "--text_max_length", 6)
    return folder


def test_captions_are_kept_and_one_is_drawn_an_epoch(tokenize_captions, captioned_folder, tmp_path):
    manifest = tokenize_captions(tmp_path / "tokens")
    assert (manifest.condition, manifest.text_encoder, manifest.class_names) == ("text", {}, [])
    assert damage_of(tmp_path / "tokens") == []
    data = ImageDataConfig(source="folder", path=str(captioned_folder), caption_column="text")
    captions = load_source(data, "train").captions
    files = str(tmp_path / "tokens" / "data" / "train-*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
    assert [tuple(texts) for texts in rows["caption"][:]] == captions * 2
    assert "- `caption`: the image's captions" in (tmp_path / "tokens" / "README.md").read_text()
    tokens = TokenDataset(tmp_path / "tokens", "train", samples_views=True, view_seed=5, reads_texts=True)
    drawn = [tokens.__getitems__([(epoch, n) for n in range(12)])["caption"] for epoch in range(12)]
    assert drawn == [tokens.__getitems__([(epoch, n) for n in range(12)])["caption"] for epoch in range(12)]
    # Every caption of every image comes up, and nothing else.
    assert [set(column) for column in zip(*drawn, strict=True)] == [set(texts) for texts in captions]


def test_features_are_those_of_the_encoder(featured_dir, text_encoder_dir, captioned_folder, tmp_path):
    manifest = TokenManifest.load(featured_dir)
    encoder = load_text_encoder(text_encoder_dir, 6)
    width = {"name": text_encoder_dir.name, "sha256": encoder.fingerprint(), "width": 8, "max_length": 6}
    assert manifest.text_encoder == width and damage_of(featured_dir) == []
    data = ImageDataConfig(source="folder", path=str(captioned_folder), caption_column="text")
    for split in ("train", "test"):
        source = load_source(data, split)
        # Mapped and in memory alike.
        for max_memory in (0, 1 << 28):
            tokens = TokenDataset(featured_dir, split, max_memory=max_memory, reads_texts=True)
            batch = tokens.__getitems__([(0, n) for n in range(len(source))])
            plain = TokenDataset(featured_dir, split, max_memory=max_memory, reads_texts=True)
            plain.manifest.text_encoder = {}
            texts = plain.__getitems__([(0, n) for n in range(len(source))])["caption"]
            assert all(text in source.captions[n] for n, text in enumerate(texts))
            embeds, mask = encoder.encode(texts)
            assert torch.equal(batch["text_mask"], mask) and mask.sum(1).max() == 6
            assert batch["text_embeds"].dtype == torch.float16
            assert torch.allclose(batch["text_embeds"][mask].float(), embeds[mask].float(), atol=2e-3)
            assert not batch["text_embeds"][~mask].any()


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(
    featured_dir, text_encoder_dir, captioned_folder, tokenizer_dir, run_on_two, tmp_path
):
    data = ["--data.source", "folder", "--data.path", captioned_folder, "--data.caption_column", "text"]
    sizes = ["--rows_per_shard", 7, "--batch_size", 4, "--has_flipped_view", "true", "--cpu", "true"]
    where = ["--tokenizer", tokenizer_dir, "--output_dir", tmp_path / "two"]
    text = ["--text_encoder", text_encoder_dir, "--text_max_length", 6]
    run_on_two(("tokenize", [*where, *data, *sizes, *text]), cwd=tmp_path)
    for path in featured_dir.rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(featured_dir)).read_bytes()


def test_jobs_of_other_captions_or_encoders_are_refused(
    tokenize_captions, featured_dir, text_encoder_dir, image_folder, tmp_path
):
    where = ("--text_encoder", text_encoder_dir)
    tokenize_captions(featured_dir, *where, "--text_max_length", 6)
    for options, difference in (
        ([*where, "--text_max_length", 5], "text_encoder is .*'max_length': 6.*; this one has .*'max_length': 5"),
        ([], "text_encoder is .*; this one has {}"),
    ):
        with pytest.raises(ValueError, match=f"holds another job, whose {difference}"):
            tokenize_captions(featured_dir, *options)
    for options, message in (
        ([*where, "--text_max_length", 33], "text_max_length is 33; expected 3 to 32"),
        ([*where, "--text_max_length", 0], "text_max_length is 0; expected 3 to 32"),
        (["--text_encoder", image_folder], "text_encoder is .*: it has no config.json"),
        (["--data.caption_column", "title"], "expected title among them"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize_captions(tmp_path / "new", *options)
    with pytest.raises(ValueError, match="text_encoder is 'x'; expected null without data.caption_column"):
        data = ImageDataConfig(source="digits")
        TokenizeConfig(tokenizer="t", output_dir="o", text_encoder="x", data=data)
    manifest = json.loads((featured_dir / "manifest.json").read_text())
    for changes, message in (
        ({"condition": "caption"}, "condition is 'caption'; expected 'class', 'text' or 'none'"),
        ({"condition": "none"}, "expected a width of at least 1, and condition 'text'"),
        ({"text_encoder": manifest["text_encoder"] | {"width": 0}}, "expected a width of at least 1"),
        ({"text_encoder": {"name": "x"}}, "text_encoder misses"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(ValueError, match=message):
            TokenManifest.load(tmp_path)


def test_an_encoder_s_features_do_not_depend_on_a_text_s_neighbours(text_encoder_dir):
    encoder = load_text_encoder(text_encoder_dir, 8)
    fingerprint = encoder.fingerprint()
    texts = ["a red bird", "the", "a small blue cat in and of the dog", "a red bird"]
    together, mask = encoder.encode(texts)
    each = encoder.encode_each(texts, batch_size=2)
    for row, is_text, alone, text in zip(together, mask, each, texts, strict=True):
        single = encoder.encode([text])[0][0]
        assert np.allclose(row[is_text].numpy(), single.numpy(), atol=2e-3)
        assert np.allclose(alone, single.numpy(), atol=2e-3)
    assert np.array_equal(each[0], each[3]) and encoder.overlong(texts[0]) == ""
    assert encoder.overlong(texts[2]) == "of the dog"
    assert encoder.fingerprint() == fingerprint
    with pytest.raises(ValueError, match="gives no token for ''; expected one at least"):
        encoder.tokenizer.backend_tokenizer.post_processor = None
        encoder.encode(["the", ""])


def test_encoders_that_lack_something_are_refused_by_name(text_encoder_dir, tmp_path):
    assert load_text_encoder(text_encoder_dir, None).max_length == 32
    # A model for another task has no pooler, which is no part of the features.
    shutil.copytree(text_encoder_dir, tmp_path / "masked")
    BertForMaskedLM(AutoConfig.from_pretrained(text_encoder_dir)).save_pretrained(tmp_path / "masked")
    first, second = (load_text_encoder(str(tmp_path / "masked"), 8).fingerprint() for _ in range(2))
    assert first == second
    for fields, message in (
        ({"_attn_implementation": "evil/kernel"}, "expected none of a repository, whose code would be run"),
        ({"num_hidden_layers": 2}, "lacks 16 tensors of a BertModel: .*; expected the weights of a trained model"),
    ):
        config = json.loads((text_encoder_dir / "config.json").read_text())
        (tmp_path / "masked" / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(ValueError, match=message):
            load_text_encoder(str(tmp_path / "masked"), 8)
    shutil.copytree(text_encoder_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="bare' has no vocabulary of its tokenizer; expected its files"):
        load_text_encoder(str(tmp_path / "bare"), 8)
    shutil.copytree(tmp_path / "bare", tmp_path / "unpadded")
    backend = AutoTokenizer.from_pretrained(text_encoder_dir).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "unpadded")
    with pytest.raises(ValueError, match="has no pad_token; expected one, by which texts are filled up"):
        load_text_encoder(str(tmp_path / "unpadded"), 8)
