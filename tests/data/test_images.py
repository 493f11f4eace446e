"""The three image sources and the dataset over them."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from nextblock.data.augment import TransformConfig, apply_transform
from nextblock.data.digits import load_digits_split
from nextblock.data.images import ImageDataConfig, ImageDataset, collate, load_source

AUGMENTED = TransformConfig(max_shift=2, max_rotation=8, max_scale=0.06, max_shear=0.05)


def solid(path, level, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 0, 255 - level)).save(path)


def level_of(source, index):
    return source.image(index).getpixel((0, 0))[0]


def folder_config(path, **options):
    return ImageDataConfig(source="folder", path=str(path), **options)


@pytest.fixture(scope="module")
def digits():
    return {split: load_source(ImageDataConfig(source="digits"), split) for split in ("train", "test")}


def test_the_digits_split_is_stratified_disjoint_and_complete(digits):
    everything = load_digits()
    rows = {split: load_digits_split(split)[2] for split in digits}
    assert len(rows["train"]) == 1437 and len(rows["test"]) == 360
    assert np.array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(1797))
    for split, source in digits.items():
        labels = [source.label(index) for index in range(len(source))]
        assert labels == everything.target[rows[split]].tolist()
        assert np.abs(np.bincount(labels) - len(labels) * np.bincount(everything.target) / 1797).max() < 1
        assert [source.identifier(index) for index in (0, 1)] == [f"digits/{row}" for row in rows[split][:2]]
    # Pinned: figures of different versions of the library are figures of the same split.
    assert rows["test"][:8].tolist() == [21, 24, 28, 34, 35, 37, 39, 42]


def test_digits_are_scaled_and_upsampled(digits):
    intensities, labels, rows = load_digits_split("train")
    assert intensities.shape == (1437, 8, 8) and intensities.min() == 0 and intensities.max() == 16
    source = digits["train"]
    assert source.class_names == "zero one two three four five six seven eight nine".split()
    for index in (0, 700, 1436):
        levels = [[round(value * 255 / 16) for value in line] for line in intensities[index]]
        expected = Image.fromarray(np.array(levels, np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        image = source.image(index)
        assert image.mode == "RGB" and image.size == (32, 32)
        assert all(np.array_equal(channel, expected) for channel in image.split())
        assert source.label(index) == labels[index]
    assert max(source.image(index).getextrema()[0][1] for index in range(50)) == 255


def test_an_unknown_split_of_the_digits_is_refused():
    with pytest.raises(ValueError, match=r"split='validation'.*\['train', 'test'\]"):
        load_source(ImageDataConfig(source="digits"), "validation")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"source": "web"}, r"source='web'.*'digits', 'folder', 'datasets'"),
        ({"source": "digits", "path": "x"}, "path='x'.*takes no path"),
        ({"source": "folder"}, "path=None.*'folder' needs a path"),
        ({"source": "datasets", "path": ""}, "path=''.*'datasets' needs a path"),
        ({"source": "digits", "split": ""}, "split=''"),
        ({"source": "digits", "eval_split": ""}, "eval_split=''"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        ImageDataConfig(**options)


def test_a_folder_gives_names_labels_and_identifiers(tmp_path):
    solid(tmp_path / "dog" / "b.PNG", 30)
    solid(tmp_path / "cat" / "z.png", 20)
    solid(tmp_path / "cat" / "deep" / "a.bmp", 10)
    solid(tmp_path / ".cache" / "hidden.png", 99)
    solid(tmp_path / "cat" / "._z.png", 99)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    source = load_source(folder_config(tmp_path), "train")
    assert source.class_names == ["cat", "dog"] and len(source) == 3
    assert [source.identifier(index) for index in range(3)] == ["cat/deep/a.bmp", "cat/z.png", "dog/b.PNG"]
    assert [source.label(index) for index in range(3)] == [0, 0, 1]
    assert [level_of(source, index) for index in range(3)] == [10, 20, 30]


def test_images_directly_in_the_folder_are_unconditional(tmp_path):
    solid(tmp_path / "b.png", 2)
    solid(tmp_path / "a.png", 1)
    source = load_source(folder_config(tmp_path), "train")
    assert source.class_names == [] and [source.label(0), source.label(1)] == [0, 0]
    assert [source.identifier(0), level_of(source, 1)] == ["a.png", 2]


def test_split_folders_share_the_class_numbers_of_the_training_split(tmp_path):
    for number, name in enumerate(("train/cat", "train/dog", "train/eel", "val/dog")):
        solid(tmp_path / name / "x.png", number)
    config = folder_config(tmp_path, eval_split="val")
    train, held_out = load_source(config, "train"), load_source(config, "val")
    assert train.class_names == held_out.class_names == ["cat", "dog", "eel"]
    assert [train.label(index) for index in range(3)] == [0, 1, 2]
    assert (held_out.label(0), level_of(held_out, 0), held_out.identifier(0)) == (1, 3, "val/dog/x.png")
    solid(tmp_path / "val" / "fox" / "x.png", 9)
    with pytest.raises(ValueError, match=r"classes \['dog', 'fox'\].*trained on has \['cat', 'dog', 'eel'\]"):
        load_source(config, "val")


def test_unusable_folders_are_refused_by_name(tmp_path):
    def refused(path, split="train", **options):
        with pytest.raises(ValueError) as error:
            load_source(folder_config(path, **options), split)
        return str(error.value)

    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused(empty)
    assert str(empty) in message and "holds no images" in message and ".png" in message
    assert "one sub-folder of them for each class" in message
    (empty / "cat").mkdir()
    assert str(empty / "cat") in refused(empty)
    solid(empty / "cat" / "x.png", 1)
    message = refused(empty, "test")
    assert "split='test' is not a sub-folder" in message and "['cat']" in message
    solid(empty / "loose.png", 1)
    assert "both directly and in sub-folders" in refused(empty)
    only_test = tmp_path / "only_test"
    solid(only_test / "test" / "cat" / "x.png", 1)
    assert "split='train' is not a sub-folder" in refused(only_test)
    assert "eval_split='test' is" in refused(only_test, "test")


def save_and_read(folder, image, name="x.png", **options):
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **options)
    result = load_source(folder_config(folder), "train").image(0)
    assert result.mode == "RGB"
    return np.asarray(result).astype(int)


def test_a_16_bit_image_keeps_its_levels(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for number, mode in enumerate(("uint16", "int32")):
        name = ("x.png", "x.tif")[number]
        pixels = save_and_read(tmp_path / mode, Image.fromarray((levels * 257).astype(mode)), name)
        assert all(np.array_equal(pixels[..., channel], levels) for channel in range(3))
    between = save_and_read(tmp_path / "between", Image.fromarray(np.full((2, 2), 128 + 257, np.uint16)))
    assert np.all(between == 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path, orientation):
    upright = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    # What a camera stores so that its viewer, doing as the tag says, shows the upright image.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = save_and_read(tmp_path / "exif", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(pixels, upright)


def test_other_modes_become_rgb(tmp_path):
    grey = np.array([[0, 100, 255]], np.uint8)
    assert save_and_read(tmp_path / "L", Image.fromarray(grey))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    bits = Image.fromarray(grey > 50)
    assert save_and_read(tmp_path / "1", bits)[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]
    clear = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)
    over_white = [[255] * 3, [200, 0, 0], [204] * 3]
    assert save_and_read(tmp_path / "RGBA", Image.fromarray(clear))[0].tolist() == over_white
    grey_alpha = Image.fromarray(clear[..., 2:]).convert("LA")
    assert save_and_read(tmp_path / "LA", grey_alpha)[0].tolist() == [[255] * 3, [0] * 3, [204] * 3]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([9, 8, 7, 0, 255, 0, 1, 2, 3])
    assert save_and_read(tmp_path / "P", palette)[0].tolist() == [[9, 8, 7], [0, 255, 0], [1, 2, 3]]
    pixels = save_and_read(tmp_path / "P2", palette, transparency=1)
    assert pixels[0].tolist() == [[9, 8, 7], [255, 255, 255], [1, 2, 3]]
    inks = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], np.uint8), "CMYK")
    assert save_and_read(tmp_path / "CMYK", inks, "x.tif")[0].tolist() == [[255] * 3, [255, 0, 0], [0] * 3]


def test_a_file_that_cannot_be_read_is_named_with_the_cause(tmp_path):
    file = tmp_path / "x.png"

    def refused():
        with pytest.raises(ValueError) as error:
            load_source(folder_config(tmp_path), "train").image(0)
        assert str(file) in str(error.value)
        return str(error.value)

    file.write_bytes(b"this is text")
    assert "UnidentifiedImageError: cannot identify image file" in refused()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    assert "OSError" in refused() and "truncated" in refused()
    Image.fromarray(np.zeros((2, 2), np.float32)).save(file, format="TIFF")
    assert "floating-point pixels" in refused()
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(file, format="TIFF")
    assert "70000" in refused() and "0 to 65535" in refused()
    source = load_source(folder_config(tmp_path), "train")
    file.unlink()
    with pytest.raises(ValueError, match="FileNotFoundError"):
        source.image(0)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


def table(datasets, labels, feature=None, image="image", label="label"):
    pictures = [Image.new("RGB", (4, 4), (10 * number, 0, 0)) for number in range(len(labels))]
    features = {image: datasets.Image(), label: feature or datasets.Value("int64")}
    return datasets.Dataset.from_dict({image: pictures, label: labels}, features=datasets.Features(features))


def read(path, split="train", **options):
    return load_source(ImageDataConfig(source="datasets", path=str(path), **options), split)


def test_a_saved_dataset_gives_the_names_of_its_class_labels(tmp_path, hub):
    names = hub.ClassLabel(names=["cat", "dog", "eel"])
    rows = table(hub, [2, 0, 1, 0], names, "picture", "animal")
    rows.save_to_disk(tmp_path / "one")
    source = read(tmp_path / "one", image_column="picture", label_column="animal")
    assert source.class_names == ["cat", "dog", "eel"]
    assert [source.label(index) for index in range(4)] == [2, 0, 1, 0]
    assert [level_of(source, index) for index in range(4)] == [0, 10, 20, 30]
    assert source.identifier(3) == "train/3"
    unconditional = read(tmp_path / "one", image_column="picture", label_column=None)
    assert unconditional.class_names == [] and unconditional.label(0) == 0
    assert level_of(unconditional, 1) == 10


def test_integer_labels_are_named_by_number_alike_in_every_split(tmp_path, hub):
    splits = hub.DatasetDict(train=table(hub, [3, 1]), test=table(hub, [0, 0, 1], hub.Value("uint8")))
    splits.save_to_disk(tmp_path / "two")
    train, held_out = read(tmp_path / "two"), read(tmp_path / "two", "test")
    assert train.class_names == held_out.class_names == ["0", "1", "2", "3"]
    assert [held_out.label(index) for index in range(3)] == [0, 0, 1] and held_out.identifier(0) == "test/0"


def test_parquet_and_image_folders_open_as_datasets_and_in_slices(tmp_path, hub):
    (tmp_path / "parquet").mkdir()
    table(hub, [0, 1, 2, 1, 0]).to_parquet(tmp_path / "parquet" / "train.parquet")
    source = read(tmp_path / "parquet")
    assert source.class_names == ["0", "1", "2"] and [level_of(source, 4), source.label(3)] == [40, 1]
    head, tail = read(tmp_path / "parquet", "train[:60%]"), read(tmp_path / "parquet", "train[60%:]")
    assert [level_of(head, index) for index in range(len(head))] == [0, 10, 20]
    assert [level_of(tail, index) for index in range(len(tail))] == [30, 40]
    assert tail.class_names == ["0", "1", "2"] and tail.label(0) == 1
    both = read(tmp_path / "parquet", "train[:1]+train[4:]")
    assert [level_of(both, index) for index in range(2)] == [0, 40]
    for number, name in enumerate(("train/cat", "train/dog", "test/dog")):
        solid(tmp_path / "files" / name / "x.png", number)
    held_out = read(tmp_path / "files", "test")
    assert held_out.class_names == ["cat", "dog"] and [held_out.label(0), level_of(held_out, 0)] == [1, 2]


def test_paths_and_bytes_in_a_column_are_images_too(tmp_path, hub):
    solid(tmp_path / "x.png", 50)
    for name, value in (("paths", str(tmp_path / "x.png")), ("bytes", (tmp_path / "x.png").read_bytes())):
        hub.Dataset.from_dict({"image": [value]}).save_to_disk(tmp_path / name)
        assert level_of(read(tmp_path / name, label_column=None), 0) == 50


def test_unusable_datasets_are_refused_by_name(tmp_path, hub):
    def refused(split="train", path=tmp_path / "saved", **options):
        with pytest.raises(ValueError) as error:
            source = read(path, split, **options)
            source.image(len(source) - 1)
        return str(error.value)

    columns = {
        "image": [{"bytes": b"broken", "path": "b.png"}],
        "label": [0],
        "hidden": [-1],
        "missing": [None],
    }
    columns |= {"text": ["cat"], "number": [0.5]}
    rows = hub.Dataset.from_dict(columns).cast_column("image", hub.Image())
    rows = rows.cast_column("missing", hub.Value("int64"))
    hub.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    message = refused("val")
    assert "split='val'" in message and "['train', 'test']" in message
    assert "split='train[['" in refused("train[[")
    assert "split='train[:0]'" in refused("train[:0]") and "no rows" in refused("train[:0]")
    message = refused(image_column="img")
    assert "image_column='img'" in message and "['image', 'label', 'hidden'" in message
    assert "label_column='klass'" in refused(label_column="klass")
    assert "image_column='number'" in refused(image_column="number")
    message = refused(label_column="number")
    assert "label_column='number'" in message and "ClassLabel, integers or texts" in message
    for column in ("hidden", "missing"):
        assert f"label_column={column!r} holds missing or negative labels" in refused(label_column=column)
    message = refused()
    assert "train/0" in message and "b.png" in message and "UnidentifiedImageError" in message
    assert str(tmp_path / "nowhere") in refused(path=tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    assert str(tmp_path / "other") in refused(path=tmp_path / "other")
    (tmp_path / "other" / "train.parquet").write_bytes(b"broken")
    assert "cannot be loaded as a dataset" in refused(path=tmp_path / "other")


def test_an_item_is_the_transformed_image_in_model_range(digits):
    source = digits["train"]
    dataset = ImageDataset(source, (24, 32), AUGMENTED, seed=5)
    item = dataset[(2, 17)]
    expected = apply_transform(source.image(17), (24, 32), AUGMENTED, 5, 2, 17).astype(np.float64) / 127.5 - 1
    assert item["pixel_values"].dtype == torch.float32 and item["pixel_values"].is_contiguous()
    assert item["pixel_values"].shape == (3, 24, 32)
    assert np.abs(item["pixel_values"].numpy() - expected.transpose(2, 0, 1)).max() < 1e-6
    assert item["class_labels"] == source.label(17) and item["index"] == 17
    plain = ImageDataset(source, 32, TransformConfig(), seed=0)
    assert plain[np.int64(3)]["pixel_values"].min() == -1
    assert max(plain[index]["pixel_values"].max() for index in range(30)) == 1


def test_the_same_key_gives_the_same_pixels_and_epochs_differ(digits):
    dataset = ImageDataset(digits["train"], (32, 32), AUGMENTED, seed=0)
    again = pickle.loads(pickle.dumps(dataset))
    keys = [(0, 5), (1, 5), (0, 6)]
    items = dataset.__getitems__(keys)
    for key, item in zip(keys, items, strict=True):
        assert torch.equal(item["pixel_values"], again[key]["pixel_values"])
    assert torch.equal(dataset[5]["pixel_values"], items[0]["pixel_values"])
    assert not torch.equal(items[0]["pixel_values"], items[1]["pixel_values"])
    other_seed = ImageDataset(digits["train"], (32, 32), AUGMENTED, seed=1)
    assert not torch.equal(other_seed[5]["pixel_values"], items[0]["pixel_values"])


def test_workers_load_the_same_batches(digits, tmp_path, hub):
    table(hub, [0, 1, 2, 1]).save_to_disk(tmp_path / "saved")
    solid(tmp_path / "files" / "cat" / "x.png", 7)
    sources = [
        digits["test"],
        read(tmp_path / "saved"),
        load_source(folder_config(tmp_path / "files"), "train"),
    ]
    for source in sources:
        dataset = pickle.loads(pickle.dumps(ImageDataset(source, 32, AUGMENTED, seed=0)))
        keys = [(3, index) for index in range(min(len(source), 6))]
        expected = collate([dataset[key] for key in keys])
        assert expected["class_labels"].dtype == expected["index"].dtype == torch.int64
        assert expected["index"].tolist() == [index for _, index in keys]
        loader = DataLoader(
            dataset, 4, sampler=keys, num_workers=1, collate_fn=collate, multiprocessing_context="fork"
        )
        batches = list(loader)
        for name, value in expected.items():
            assert torch.equal(torch.cat([batch[name] for batch in batches]), value)


def test_a_dataset_refuses_bad_arguments_and_indices(digits):
    for image_size in (0, (32, -1), (32, 32, 3), "32", (32.0, 32.0)):
        with pytest.raises(ValueError, match="image_size"):
            ImageDataset(digits["test"], image_size, TransformConfig(), seed=0)
    with pytest.raises(ValueError, match="seed=-1"):
        ImageDataset(digits["test"], 32, TransformConfig(), seed=-1)
    dataset = ImageDataset(digits["test"], 32, TransformConfig(), seed=0)
    for key in (360, -1, (0, 360)):
        with pytest.raises(IndexError, match=r"0\.\.359"):
            dataset[key]


def test_importing_the_module_does_not_import_datasets():
    code = "import sys, nextblock.data.images; assert not {'datasets', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
