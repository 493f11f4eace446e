"""ADM's center crop: halving, bicubic resizing, the center."""

import numpy as np
from PIL import Image

from nextblock.data.adm_crop import AdmCropped, adm_crop
from nextblock.data.image_folder import scan_image_folder


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_picture_of_the_right_size_stays_and_longer_ones_lose_their_ends():
    image = picture(16, 16)
    assert np.array_equal(adm_crop(image, 16), image)
    wide = picture(21, 16)
    assert np.array_equal(adm_crop(wide, 16), np.asarray(wide)[:, 2:18])
    tall = picture(16, 31)
    assert np.array_equal(adm_crop(tall, 16), np.asarray(tall)[7:23])


def test_pictures_at_least_twice_as_large_are_averaged_first():
    # PIL rounds rows and then columns.
    image = picture(64, 64)
    means = np.asarray(image).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(adm_crop(image, 32), float) - means).max() <= 1
    again = np.floor(means + 0.5).reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(adm_crop(image, 16), float) - again).max() <= 2


def test_other_sizes_are_resized_by_the_shorter_side():
    image = picture(50, 75)  # not twice 32: resized to 32 x 48
    resized = np.asarray(image.resize((32, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(adm_crop(image, 32), resized[8:40])
    small = picture(10, 7)
    resized = np.asarray(small.resize((46, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(adm_crop(small, 32), resized[:, 7:39])


def test_a_source_is_cropped_image_by_image(tmp_path):
    (tmp_path / "cat").mkdir()
    picture(50, 75).save(tmp_path / "cat" / "a.png")
    source = scan_image_folder(tmp_path, "train")
    cropped = AdmCropped(source, 32)
    assert len(cropped) == 1 and cropped.class_names == ["cat"] and cropped.label(0) == 0 and cropped.captions is None
    assert cropped.identifier(0) == source.identifier(0)
    assert np.array_equal(cropped.image(0), adm_crop(picture(50, 75), 32))
