"""Columns of labels in datasets, read in any order and as a stream: rows without a label, identifiers."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nextblock.data.class_numbers import numbered_classes
from nextblock.data.images import ImageDataConfig, load_source


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Write a dataset with some labels and open it, in any order or as a stream."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def open_labelled(labels: list, kind: str, is_streamed: bool):
        pictures = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(len(labels))]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
        folder = tmp_path / f"{kind}-{abs(hash(str(labels)))}"
        folder.mkdir()
        rows = datasets.Dataset.from_dict({"image": pictures, "label": [0] * len(labels)}, features=features)
        rows.to_parquet(folder / "train.parquet")
        table = pq.read_table(folder / "train.parquet")
        column = pa.array(labels, table.schema.field("label").type)
        pq.write_table(table.set_column(1, table.schema.field("label"), column), folder / "train.parquet")
        config = ImageDataConfig(source="datasets", path=str(folder), is_streamed=is_streamed)
        return load_source(config, "train", in_order=True)

    return open_labelled


@pytest.mark.parametrize("is_streamed", [False, True])
def test_rows_without_a_label_are_named(opened, is_streamed):
    with pytest.raises(ValueError, match=r"missing or negative labels in 2 of 4 rows, such as \[1, 3\]"):
        opened([0, None, 2, None], "int64", is_streamed)
    with pytest.raises(ValueError, match=r"negative labels in 1 of 3 rows, such as \[2\]"):
        opened([0, 1, -1], "int32", is_streamed)
    with pytest.raises(ValueError, match=r"negative labels in 1 of 2 rows, such as \[1\]"):
        opened([0, (1 << 64) - 1], "uint64", is_streamed)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_identifiers_are_no_classes(opened, is_streamed):
    for largest in (30_000_000, 1 << 62, 25_000):
        with pytest.raises(ValueError, match=f"labels up to {largest} for 3 images.*label_column null"):
            opened([5, largest, 7], "int64", is_streamed)
    source = opened([0, 1000, 3], "uint16", is_streamed)
    assert len(source.class_names) == 1001 and source.label(1) == 1000


def test_many_classes_with_images_for_them_are_fine():
    assert len(numbered_classes(60_000, 120_000, "labels")) == 60_000
    with pytest.raises(ValueError, match="60000 classes"):
        numbered_classes(60_000, 119_999, "labels")
    assert numbered_classes(np.int64(2), 2, "labels") == ["0", "1"]
