import numpy as np
from PIL import Image

from nextblock.evaluation.sample_sets import open_samples
from nextblock.result_pictures import draw_result, sample_grid


def flat(levels) -> np.ndarray:
    return np.array(levels, np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)


def test_samples_of_a_class_are_a_row(tmp_path):
    np.savez(tmp_path / "x.npz", flat([50, 10, 11, 51, 12, 90]), np.array([5, 1, 1, 5, 1, 9]))
    picture = np.asarray(sample_grid(open_samples(tmp_path / "x.npz")))
    assert picture[34::66, 34::66, 0].tolist() == [[10, 11, 12], [50, 51, 255], [90, 255, 255]]
    np.savez(tmp_path / "x.npz", flat(range(13)), np.zeros(13, np.int64))
    picture = np.asarray(sample_grid(open_samples(tmp_path / "x.npz")))
    assert picture[34::66, 34::66, 0].tolist() == [[*range(10)], [10, 11, 12] + [255] * 7]


def test_the_nearest_pairs_come_first(tmp_path):
    for name, levels in (("samples", range(30)), ("train", range(100, 140))):
        np.savez(tmp_path / f"{name}.npz", flat(levels))
    samples, train = (open_samples(tmp_path / f"{name}.npz") for name in ("samples", "train"))
    order = np.random.default_rng(0).permutation(30)
    nearest = {"sample_numbers": order, "train_numbers": order + 5, "distances": (29.0 - order) ** 2}
    np.savez(tmp_path / "nearest.npz", **nearest)
    draw_result(tmp_path, {"fid": 1.5}, {"fid": "FID"}, samples, train, "nearest.npz")
    picture = np.asarray(Image.open(tmp_path / "neighbours.png"))
    width = 64 + 64 + 8 + 2
    assert picture.shape[:2] == (4 * 66 + 2, 5 * width + 2)
    assert picture[34, 34::width, 0].tolist() == [29, 28, 27, 26, 25]
    assert picture[34 + 3 * 66, 98::width, 0].tolist() == [119, 118, 117, 116, 115]
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 2
    (tmp_path / "other").mkdir()
    draw_result(tmp_path / "other", {"fid": 1.5}, {"fid": "FID"}, samples, None, "nearest.npz")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["report.html", "samples.png"]
