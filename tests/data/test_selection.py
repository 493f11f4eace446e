"""Shares that are held out by name, class names that are given, labels that are texts or counted from 1."""

import datasets
import pytest
from PIL import Image

from nextblock.data.images import ImageDataConfig, load_source
from nextblock.data.selection import is_held_out


def write_pictures(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(root / name)


def identifiers(source):
    return [source.identifier(index) for index in range(len(source))]


def labels(source):
    return [source.label(index) for index in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path, [f"{name}/{n}.png" for name in ("cat", "dog") for n in range(40)])
    return tmp_path


def both(path, **options):
    config = ImageDataConfig(source="folder", path=str(path), **options)
    return load_source(config, "train"), load_source(config, "test")


def test_a_share_is_held_out_by_name_alone(folder):
    train, heldout = both(folder, eval_fraction=0.25)
    assert len(train) + len(heldout) == 80 and 8 <= len(heldout) <= 32
    assert not set(identifiers(train)) & set(identifiers(heldout))
    assert all(is_held_out(name, 0.25) for name in identifiers(heldout))
    assert train.class_names == heldout.class_names == ["cat", "dog"]
    assert labels(heldout) == [["cat", "dog"].index(name.split("/")[0]) for name in identifiers(heldout)]
    assert heldout.image(0).size == (4, 4)
    before = set(identifiers(heldout))
    write_pictures(folder, [f"ant/{n}.png" for n in range(40)])
    _, more = both(folder, eval_fraction=0.25)
    assert {name for name in identifiers(more) if not name.startswith("ant/")} == before
    # A larger share holds out what a smaller one does, and more.
    assert set(identifiers(more)) < set(identifiers(both(folder, eval_fraction=0.6)[1]))
    # Pinned: figures of different versions are figures of the same split.
    assert [n for n in range(8) if is_held_out(f"cat/{n}.png", 0.5)] == [1, 3, 4, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_fraction": 0.0}, "eval_fraction=0.0: expected a number between 0 and 1"),
        ({"eval_fraction": 1.0}, "eval_fraction=1.0: expected a number between 0 and 1"),
        ({"eval_fraction": 0.1, "eval_split": None}, "eval_split=None with eval_fraction=0.1: expected a name"),
        ({"eval_fraction": 0.1, "eval_split": "train"}, "eval_split='train' with eval_fraction=0.1"),
        ({"eval_fraction": 0.1, "eval_split": "dog"}, "has a sub-folder 'dog'"),
        ({"eval_fraction": 1e-9}, "the held-out part of 80 images is empty"),
        ({"first_label": -1}, "first_label=-1: expected 0 or more"),
        ({"eval_fraction": 0.1, "first_label": 1}, r"first_label=1: classes have names, \['cat', 'dog'\]"),
        ({"eval_fraction": 0.1, "class_names": ["a"]}, "1 names for 2 classes"),
        ({"eval_fraction": 0.1, "class_names": ["a", "b", "c"]}, "3 names for 2 classes"),
        ({"eval_fraction": 0.1, "class_names": ["a", "a"]}, "blank or repeated names"),
        ({"eval_fraction": 0.1, "class_names": "nowhere.txt"}, "class_names='nowhere.txt' is no file"),
    ],
)
def test_wrong_selections_are_refused_by_name(folder, options, message):
    with pytest.raises(ValueError, match=message):
        source, split = "folder", options.get("eval_split") or "test"
        load_source(ImageDataConfig(source=source, path=str(folder), **options), split)


def test_names_are_given_in_a_list_or_a_file(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("names") / "names.txt"
    file.write_text("Katze\nHund\n", encoding="utf-8")
    for given in (["Katze", "Hund"], str(file)):
        train, heldout = both(folder, eval_fraction=0.25, class_names=given)
        assert train.class_names == heldout.class_names == ["Katze", "Hund"]


def save_dataset(path, values):
    pictures = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(len(values))]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": values})
    datasets.DatasetDict({"train": rows, "test": rows.select([len(values) - 1])}).save_to_disk(str(path))
    return {"source": "datasets", "path": str(path)}


def test_texts_are_classes_in_their_order(tmp_path):
    options = save_dataset(tmp_path / "rows", ["wren", "blue tit", "wren", "great tit"])
    config = ImageDataConfig(**options)
    assert load_source(config, "train").class_names == ["blue tit", "great tit", "wren"]
    assert labels(load_source(config, "train")) == [2, 0, 2, 1] and labels(load_source(config, "test")) == [1]
    options = save_dataset(tmp_path / "gap", ["wren", None, "wren"])
    with pytest.raises(ValueError, match="label_column='label' holds missing"):
        load_source(ImageDataConfig(**options), "train")


def test_labels_counted_from_1_are_noticed(tmp_path):
    options = save_dataset(tmp_path / "rows", [1, 3, 2, 1])
    with pytest.raises(ValueError, match="labels run from 1 to 3: class 0 would have no image; expected --data.first"):
        load_source(ImageDataConfig(**options), "train")
    config = ImageDataConfig(**options, first_label=1)
    source = load_source(config, "train")
    assert labels(source) == [0, 2, 1, 0] and source.class_names == ["1", "2", "3"]
    assert labels(load_source(config, "test")) == [0]
    by_chance = load_source(ImageDataConfig(**options, first_label=0), "train")
    assert labels(by_chance) == [1, 3, 2, 1] and by_chance.class_names == ["0", "1", "2", "3"]
    named = load_source(ImageDataConfig(**options, first_label=1, class_names=["a", "b", "c", "d"]), "train")
    assert named.class_names == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="first_label=2: an image has the label 1"):
        load_source(ImageDataConfig(**options, first_label=2), "train")
    # Numbers with a gap, or that begin at 0, say nothing of the kind.
    for values in ([0, 1, 2], [2, 3, 5]):
        load_source(ImageDataConfig(**save_dataset(tmp_path / str(values), values)), "train")
