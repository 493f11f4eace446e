"""Tokens back to pictures: the decoder's, row by row, and a grid."""

import numpy as np
import pytest
from PIL import Image

from nextblock.data.pixels import to_uint8
from nextblock.data.tokens import TokenDataset
from nextblock.detokenize import DetokenizeConfig, detokenize
from nextblock.tokenizer import VQVAE


@pytest.fixture
def detokenize_here(run_here, tokens_dir, tokenizer_dir):
    def run(output_dir, *options):
        folders = ("--tokenizer", tokenizer_dir, "--tokens", tokens_dir, "--output_dir", output_dir)
        run_here(detokenize, DetokenizeConfig, *folders, "--cpu", "true", *options)

    return run


def test_pictures_are_what_the_codes_decode_to(detokenize_here, tokens_dir, tokenizer_dir, tmp_path):
    detokenize_here(tmp_path / "new", "--split", "test", "--first_row", 3, "--num_images", 100, "--batch_size", 5)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == [*(f"{row:08d}.png" for row in range(3, 15)), "grid.png"]
    model, tokens = VQVAE.from_pretrained(tokenizer_dir).eval(), TokenDataset(tokens_dir, "test")
    idx_Bl = tokens.layout.split(tokens.__getitems__(range(3, 15))["labels"])
    for row, expected in zip(range(3, 15), to_uint8(model.idxBl_to_img(idx_Bl)), strict=True):
        got = np.asarray(Image.open(tmp_path / "new" / f"{row:08d}.png")).astype(int)
        assert np.abs(got - expected).max() <= 1
    assert Image.open(tmp_path / "new" / "grid.png").width > 10 * 64


def test_the_training_split_is_what_is_shown_by_default(detokenize_here, tmp_path):
    detokenize_here(tmp_path / "new", "--num_images", 2)
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_jobs_that_do_not_fit_are_refused(detokenize_here, tokenizer_dir, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="full holds files; expected a new or empty folder"):
        detokenize_here(tmp_path / "full")
    with pytest.raises(ValueError, match="first_row is 15; expected under 15"):
        detokenize_here(tmp_path / "new", "--split", "test", "--first_row", 15)
    VQVAE.from_pretrained(tokenizer_dir, revival_threshold=0.5).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the tokenizer has weights"):
        detokenize_here(tmp_path / "new", "--tokenizer", tmp_path / "other")
    for name, least in (("num_images", 1), ("batch_size", 1), ("first_row", 0)):
        with pytest.raises(SystemExit):
            detokenize_here(tmp_path / "new", f"--{name}", least - 1)
        assert f"{name} is {least - 1}; expected at least {least}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
