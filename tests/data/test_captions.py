"""Captions of folders, tars and datasets: every image gets its own, mistakes are named, draws depend on keys alone."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.data.augment import TransformConfig
from nextblock.data.captions import draw_captions
from nextblock.data.images import ImageDataConfig, ImageDataset, load_source, source_files
from nextblock.data.text_columns import caption_embeds, check_texts, padded_embeds, text_arrays
from nextblock.data.token_shards import read_shard, write_shard
from nextblock.files.atomic import file_sha256


def picture(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")


def captions_of(root, source="folder", split="train", **options) -> dict[str, tuple[str, ...]]:
    config = ImageDataConfig(source=source, path=str(root), **({"caption_column": "text"} | options))
    images = load_source(config, split)
    return {images.identifier(n): images.captions[n] for n in range(len(images))}


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_folder_s_metadata_lies_beside_its_images_or_above_them(tmp_path):
    for name in ("train/a.png", "train/b.png", "train/deep/c.png", "test/a.png"):
        picture(tmp_path / name)
    (tmp_path / "train" / "deep" / "c.png").rename(tmp_path / "train" / "c.png")
    rows = [{"file_name": "a.png", "text": " a cat "}, {"file_name": "./b.png", "text": ["two\u2028lines", "b"]}]
    (tmp_path / "train" / "metadata.jsonl").write_text("\ufeff" + lines(*rows) + "\n")
    table = 'file_name,text,n\ntrain/c.png,"a ""c"", quoted",1\ntest/a.png,held\u2028out,2\n'
    (tmp_path / "metadata.csv").write_text(table)
    (tmp_path / "train" / "deep").rmdir()
    expected = {"train/a.png": ("a cat",), "train/b.png": ("two\u2028lines", "b"), "train/c.png": ('a "c", quoted',)}
    assert captions_of(tmp_path) == expected
    assert captions_of(tmp_path, split="test") == {"test/a.png": ("held\u2028out",)}
    # What is recorded of a source's files are the captions' files too.
    config = ImageDataConfig(source="folder", path=str(tmp_path), caption_column="text")
    files = source_files(config, load_source(config, "train"), "train")[1]
    assert files == [*expected, "metadata.csv", "train/metadata.jsonl"]
    plain = load_source(ImageDataConfig(source="folder", path=str(tmp_path)), "train")
    assert plain.captions is None


def test_captions_go_with_classes_held_out_shares_and_repaired_names(tmp_path):
    names = [f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(10)]
    for name in names:
        picture(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(lines(*({"file_name": name, "text": f"of {name}"} for name in names)))
    assert captions_of(tmp_path) == {name: (f"of {name}",) for name in names}
    parts = [captions_of(tmp_path, split=split, eval_fraction=0.3) for split in ("train", "test")]
    assert all(parts) and parts[0] | parts[1] == {name: (f"of {name}",) for name in names}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no caption, or a blank one, for 1 of 1 images, such as a.png"),
        (lines({"file_name": "a.png", "text": "  "}), "no caption, or a blank one"),
        (lines({"file_name": "a.png", "text": []}), "no caption, or a blank one"),
        (lines({"file_name": "a.png", "text": ["b", ""]}), "no caption, or a blank one"),
        (lines({"file_name": "a.png", "text": 3}), "holds 3 for a.png; expected a text"),
        (lines({"file_name": "a.png", "text": ["b", None]}), "expected a text, or a list of texts"),
        (lines({"file_name": "a.png", "text": "x" * 20_001}), "caption of 20001 characters"),
        (lines({"file_name": "a.png", "caption": "b"}), r"line 1: it has the fields \['file_name', 'caption'\]"),
        (lines({"text": "b"}), "expected file_name among them"),
        (lines({"file_name": 3, "text": "b"}), "file_name is 3"),
        (lines({"file_name": "b.png", "text": "b"}), "line 1: there is no file 'b.png'"),
        (lines(*[{"file_name": "a.png", "text": "b"}] * 2), "line 2: 'a.png' is named twice"),
        ("{\n", "line 1: '{' is no JSON"),
        ("[1]\n", r"line 1: '\[1\]'; expected an object"),
    ],
)
def test_metadata_that_does_not_fit_is_named(tmp_path, text, message):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        captions_of(tmp_path)


def test_metadata_files_that_are_none_are_named(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no metadata.jsonl or metadata.csv"):
        captions_of(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"open\n')
    with pytest.raises(ValueError, match="cannot be read: unexpected end"):
        captions_of(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png\n")
    with pytest.raises(ValueError, match="other columns than"):
        captions_of(tmp_path)
    (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(ValueError, match="lies beside metadata.jsonl"):
        captions_of(tmp_path)
    for options in ({"source": "digits", "path": None}, {"source": "folder", "path": "x", "caption_column": ""}):
        with pytest.raises(ValueError, match="caption_column="):
            ImageDataConfig(**({"caption_column": "text"} | options))


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_members_of_tars_hold_captions(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    png = file.getvalue()
    members = {"a.png": png, "a.txt": "Bär\n".encode(), "x/b.png": png, "x/b.TXT": b" two\nlines", "b.json": b""}
    write_tar(tmp_path / "train.tar", members)
    found = captions_of(tmp_path, "webdataset", caption_column="txt")
    assert found == {"train.tar/a.png": ("Bär",), "train.tar/x/b.png": ("two\nlines",)}
    for changes, message in (
        ({"a.txt": b"\xff"}, "a.txt of .* is no text in UTF-8"),
        ({"a.txt": b" "}, "a blank one, for 1 of 2"),
        ({"c.txt": b"c"}, "1 of 3 .txt are of no image, such as c.txt"),
        ({"a.b.txt": b"c"}, "a.b.txt is a second caption"),
        ({"a.txt": b"x" * 100_000}, "100000 bytes"),
    ):
        write_tar(tmp_path / "train.tar", members | changes)
        with pytest.raises(ValueError, match=message):
            captions_of(tmp_path, "webdataset", caption_column="txt")


def test_columns_of_datasets_hold_captions_streamed_or_not(tmp_path):
    pictures = [{"bytes": None, "path": str(tmp_path / f"{n}.png")} for n in range(5)]
    for stored in pictures:
        picture(tmp_path / stored["path"])
    texts = [[f"{n}", f"also {n}"][: 1 + n % 2] for n in range(5)]
    columns = {"image": pictures, "many": texts, "one": [each[0] for each in texts], "number": list(range(5))}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train-0.parquet")
    options = {"source": "datasets", "label_column": None}
    for is_streamed in (False, True):
        config = {"path": str(tmp_path / "data"), "is_streamed": is_streamed, **options}
        for split, part in (("train", range(5)), ("train[1:4]", range(1, 4))):
            for column, expected in (("many", texts), ("one", [each[:1] for each in texts])):
                source = load_source(ImageDataConfig(**config, caption_column=column), split, in_order=True)
                assert source.captions == [tuple(expected[n]) for n in part]
        with pytest.raises(ValueError, match="caption_column='number' holds .*; expected texts"):
            load_source(ImageDataConfig(**config, caption_column="number"), "train", in_order=True)
        with pytest.raises(ValueError, match="caption_column='none': split 'train' has the columns"):
            load_source(ImageDataConfig(**config, caption_column="none"), "train", in_order=True)


def test_a_draw_depends_on_seed_epoch_and_image_alone():
    counts, index = [3] * 300, list(range(300))
    drawn = draw_captions(counts, 1, [0] * 300, index)
    assert set(drawn) == {0, 1, 2} and max(abs(drawn.count(n) - 100) for n in range(3)) < 35
    assert draw_captions([3, 3], 1, [0, 0], [7, 250]) == [drawn[7], drawn[250]]
    for seed, epoch in ((1, 1), (2, 0)):
        other = draw_captions(counts, seed, [epoch] * 300, index)
        assert 0.5 < np.mean([a != b for a, b in zip(drawn, other, strict=True)]) < 0.8
    mixed = draw_captions(counts, 1, [n % 2 for n in index], index)
    odd = draw_captions(counts, 1, [1] * 300, index)
    assert mixed == [(drawn, odd)[n % 2][n] for n in index]


def test_items_have_a_caption_drawn_anew_in_every_epoch(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(lines({"file_name": "a.png", "text": ["x", "y", "z"]}))
    source = load_source(ImageDataConfig(source="folder", path=str(tmp_path), caption_column="text"), "train")
    images = ImageDataset(source, 4, TransformConfig(), seed=0, gives_captions=True)
    drawn = [images[(epoch, 0)]["caption"] for epoch in range(20)]
    assert set(drawn) == {"x", "y", "z"} and drawn == [images[(epoch, 0)]["caption"] for epoch in range(20)]
    assert "caption" not in ImageDataset(source, 4, TransformConfig(), seed=0)[0]
    source.captions = None
    with pytest.raises(ValueError, match="the 1 images have no captions"):
        ImageDataset(source, 4, TransformConfig(), seed=0, gives_captions=True)


def test_shards_give_back_captions_and_their_features(tmp_path):
    rng = np.random.default_rng(0)
    captions = [("a", "bb"), ("ccc",), ("dd", "é", "f")]
    embeds = [[rng.normal(size=(len(text), 4)).astype(np.float16) for text in texts] for texts in captions]
    path, zeros = tmp_path / "a.parquet", np.zeros(3, np.int64)
    write_shard(path, np.zeros((3, 2), int), zeros, list("xyz"), zeros, [], 8, (), captions, embeds)
    rows = read_shard(path, 3, file_sha256(path), ["caption", "text_embeds"])
    check_texts(path, rows.texts, 4)
    assert [tuple(texts) for texts in rows.texts["caption"].to_pylist()] == captions
    for n, row in enumerate(embeds):
        for number, features in enumerate(row):
            assert np.array_equal(caption_embeds(rows.texts, n, number, 4), features)
    assert datasets.Dataset.from_parquet(str(path))[1]["caption"] == ["ccc"]
    padded, mask = padded_embeds([embeds[1][0], embeds[0][0]])
    assert padded.shape == (2, 3, 4) and mask.tolist() == [[True] * 3, [True, False, False]]
    assert np.array_equal(padded[0], embeds[1][0]) and np.array_equal(padded[1, :1], embeds[0][0])
    assert not padded[1, 1:].any()
    # Features of another width, or of fewer captions, are none of these.
    others = dict(zip(rows.texts, text_arrays(captions, [row[:1] for row in embeds]), strict=True))
    for texts, width in ((rows.texts, 3), (others, 4)):
        with pytest.raises(ValueError, match=f"expected features of {width} channels for each caption"):
            check_texts(path, texts, width)
    empty = dict(zip(rows.texts, text_arrays([(), ("a",)], None), strict=False))
    with pytest.raises(ValueError, match="rows without a caption"):
        check_texts(path, empty, None)
    write_shard(path, np.zeros((3, 2), int), zeros, list("xyz"), zeros, [], 8)
    with pytest.raises(ValueError, match=r"expected \['caption'\] too"):
        read_shard(path, 3, file_sha256(path), ["caption"])
    assert torch.equal(torch.from_numpy(rows.idx.astype(np.int64)), torch.zeros(3, 2, dtype=torch.int64))
