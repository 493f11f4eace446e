"""Streamed datasets give the images, labels and names of the same dataset read in any order."""

import pickle

import numpy as np
import pytest
from PIL import Image

from nextblock.data.images import ImageDataConfig, load_source
from nextblock.data.unreadable import UnreadableImageError

ORDER = [0, 1, 5, 6, 3, 9, 2, 2]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


def write_parquet(datasets, folder, labels, feature, split="train", rows_per_file=4):
    """Files of three rows a row group; picture number n has the level 10 n."""
    folder.mkdir(exist_ok=True)
    for number, start in enumerate(range(0, len(labels), rows_per_file)):
        part = labels[start : start + rows_per_file]
        pictures = [Image.new("RGB", (4, 4), (10 * (start + place), 0, 0)) for place in range(len(part))]
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        rows = datasets.Dataset.from_dict({"image": pictures, "label": part}, features=features)
        rows.to_parquet(folder / f"{split}-{number}.parquet", batch_size=3)


def read(path, split="train", *, is_streamed=True, **options):
    config = ImageDataConfig(source="datasets", path=str(path), is_streamed=is_streamed, **options)
    return load_source(config, split, in_order=True)


def content(source, order=None):
    order = range(len(source)) if order is None else order
    return [(np.asarray(source.image(i)).tolist(), source.label(i), source.identifier(i)) for i in order]


def test_a_stream_of_parquet_files_gives_the_rows_of_the_dataset(tmp_path, hub):
    names = hub.ClassLabel(names=["cat", "dog", "eel"])
    write_parquet(hub, tmp_path / "rows", [2, 0, 1, 0, 1, 1, 0, 2, 2, 0], names)
    write_parquet(hub, tmp_path / "rows", [1, 0], names, "test")
    for split in ("train", "test", "train[3:8]", "train[:50%]", "test+train[9:]+train[:2]"):
        streamed, expected = read(tmp_path / "rows", split), read(tmp_path / "rows", split, is_streamed=False)
        assert streamed.class_names == expected.class_names == ["cat", "dog", "eel"]
        assert content(streamed) == content(expected) and len(streamed) == len(expected)
    streamed, expected = read(tmp_path / "rows"), read(tmp_path / "rows", is_streamed=False)
    assert content(streamed, ORDER) == content(expected, ORDER)
    assert content(pickle.loads(pickle.dumps(streamed)), ORDER) == content(expected, ORDER)
    unconditional = read(tmp_path / "rows", label_column=None)
    assert (len(unconditional), unconditional.class_names, unconditional.label(0)) == (10, [], 0)


def test_numbered_classes_are_those_of_all_splits(tmp_path, hub):
    write_parquet(hub, tmp_path / "rows", [0, 1, 0], hub.Value("int64"))
    write_parquet(hub, tmp_path / "rows", [3], hub.Value("int64"), "test")
    assert read(tmp_path / "rows").class_names == ["0", "1", "2", "3"]
    assert read(tmp_path / "rows", is_streamed=False).class_names == ["0", "1", "2", "3"]


def test_a_stream_of_image_files_gives_the_rows_of_the_dataset(image_folder, hub):
    streamed, expected = read(image_folder), read(image_folder, is_streamed=False)
    assert streamed.class_names == ["blue tit", "great tit", "wren"] and len(streamed) == 48
    assert content(streamed) == content(expected)


def test_pieces_before_the_first_image_are_not_read(tmp_path, hub):
    write_parquet(hub, tmp_path / "rows", list(range(10)), hub.Value("int64"))
    source = read(tmp_path / "rows")
    (tmp_path / "rows" / "train-0.parquet").unlink()
    assert [source.image(index).getpixel((0, 0))[0] for index in range(4, 10)] == [40, 50, 60, 70, 80, 90]
    with pytest.raises(FileNotFoundError):
        source.image(3)


def test_rows_that_vanish_after_the_count_are_noticed(tmp_path, hub):
    write_parquet(hub, tmp_path / "rows", [0, 1, 2, 3, 4, 5, 6], hub.Value("int64"), rows_per_file=9)
    source = read(tmp_path / "rows")
    # The second of the row groups of three loses a row.
    write_parquet(hub, tmp_path / "rows", [0, 1, 2, 3, 4], hub.Value("int64"), rows_per_file=9)
    with pytest.raises(ValueError, match="ends 1 rows before its count"):
        content(source)


def test_an_image_that_cannot_be_decoded_is_named_and_the_next_one_read(tmp_path, hub):
    write_parquet(hub, tmp_path / "rows", [0, 1, 2], hub.Value("int64"))
    broken = {"image": [{"bytes": b"broken", "path": "b.png"}], "label": [0]}
    rows = hub.Dataset.from_dict(broken).cast_column("image", hub.Image(decode=False))
    rows.to_parquet(tmp_path / "rows" / "train-1.parquet")
    source = read(tmp_path / "rows")
    with pytest.raises(UnreadableImageError, match=r"train/3 .*b\.png") as error:
        source.image(3)
    assert error.value.reason == "corrupt"
    assert source.image(2).getpixel((0, 0)) == (20, 0, 0)


def test_streams_that_do_not_fit_are_refused(tmp_path, hub):
    def refused(message, path=tmp_path / "rows", split="train", **options):
        with pytest.raises(ValueError, match=message):
            read(path, split, **options)

    write_parquet(hub, tmp_path / "rows", [0, -1], hub.Value("int64"))
    refused("label_column='label' holds missing or negative labels")
    refused("label_column='klass'", label_column="klass")
    refused("image_column='label' holds", image_column="label")
    refused(r"split='val'.*\['train'\]", split="val")
    refused(r"split='train\[:0\]'.*has no rows", split="train[:0]")
    refused("cannot be loaded as a dataset", path=tmp_path / "nowhere")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("image,label\nx.png,0\n")
    refused("columns of this format are unknown", path=tmp_path / "table")
    hub.Dataset.from_dict({"label": [0]}).save_to_disk(tmp_path / "saved")
    refused("was written by save_to_disk", path=tmp_path / "saved")
    with pytest.raises(ValueError, match="is_streamed=True: source='digits' is no stream"):
        ImageDataConfig(source="digits", is_streamed=True)
    config = ImageDataConfig(source="datasets", path=str(tmp_path / "rows"), is_streamed=True)
    with pytest.raises(ValueError, match="expected is_streamed=False, or tokens that `nextblock tokenize` makes"):
        load_source(config, "train")
