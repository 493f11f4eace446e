import json

import pytest
import torch
from PIL import Image

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, ImageDataset, collate, load_source
from nextblock.evaluate_tokenizer import main
from nextblock.evaluation.codebook import code_counts, perplexity, usage
from nextblock.evaluation.metrics import psnr
from nextblock.tokenizer import VQVAE, VQVAEConfig


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    torch.manual_seed(0)
    config = VQVAEConfig(image_size=32, hidden_dim=4, embedding_dim=4, layout="scales", scales=[1, 2, 8])
    folder = tmp_path_factory.mktemp("tokenizer")
    VQVAE(config).save_pretrained(folder)
    return folder


def test_report_equals_the_figures_computed_by_hand(tokenizer_dir, tmp_path, capsys):
    output_dir = tmp_path / "out"
    arguments = ["--tokenizer", str(tokenizer_dir), "--output_dir", str(output_dir), "--batch_size", "77"]
    main(["--config", "tokenizer/evaluate-digits", *arguments, "--num_pictures", "5"])
    report = json.loads((output_dir / "report.json").read_text())

    tokenizer = VQVAE.from_pretrained(tokenizer_dir)
    dataset = ImageDataset(load_source(ImageDataConfig(source="digits"), "test"), (32, 32), TransformConfig(), seed=0)
    pixel_values = collate([dataset[index] for index in range(len(dataset))])["pixel_values"]
    idx_BL = tokenizer.img_to_idx(pixel_values)
    counts = code_counts(idx_BL, tokenizer.layout.block_lengths, tokenizer.config.vocab_size)
    values = psnr(tokenizer.idx_to_img(idx_BL), pixel_values)

    assert report["data"]["num_images"] == len(dataset) == 360
    assert report["figures"]["reconstruction_psnr"] == pytest.approx(values.mean().item(), abs=1e-4)
    assert report["figures"]["code_usage"] == usage(counts.sum(0)).item()
    assert report["figures"]["code_perplexity"] == pytest.approx(perplexity(counts.sum(0)).item(), rel=1e-3)
    assert report["codebook"]["num_tokens"] == 360 * (1 + 4 + 64)
    assert len(report["codebook"]["block_perplexity"]) == 3
    assert report["parameters"]["tokenizer"] == sum(p.numel() for p in tokenizer.parameters())
    with Image.open(output_dir / "reconstructions.png") as picture:
        assert picture.size == (5 * 66 + 2, 2 * 66 + 2)
    assert "reconstruction psnr" in capsys.readouterr().out


def test_options_are_checked(tokenizer_dir, tmp_path, capsys):
    arguments = ["--tokenizer", str(tokenizer_dir), "--output_dir", str(tmp_path), "--data.source", "digits"]
    for wrong, message in (
        (["--data.eval_split", "null"], "split and data.eval_split are both null"),
        (["--batch_size", "0"], "batch_size is 0"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="nowhere"):
        main([*arguments, "--split", "nowhere"])
