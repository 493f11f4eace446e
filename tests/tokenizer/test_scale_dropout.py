"""Images decoded from fewer scales in training: how many is drawn by keys, and the task asks for it."""

import pytest
import torch
from accelerate import Accelerator

from nextblock.tokenizer.codec_scales import drawn_num_scales
from nextblock.tokenizer.task import TokenizerTask, TokenizerTrainConfig, VQVAEOptions, build_tokenizer
from nextblock.training.loop_config import LoopConfig

SCALES = {"layout": "scales", "scales": [1, 2, 4], "num_phi": 1}


def run(scale_dropout: float, **options) -> TokenizerTrainConfig:
    sizes = {"image_size": 16, "hidden_dim": 4, "embedding_dim": 4, "codebook_init_scale": 0.5}
    loop = LoopConfig(num_steps=4, batch_size=8, seed=3)
    model = VQVAEOptions(**sizes | SCALES | options)
    return TokenizerTrainConfig(output_dir="unused", model=model, loop=loop, scale_dropout=scale_dropout)


def test_a_share_of_images_gets_evenly_from_one_scale_to_all_but_one():
    drawn = drawn_num_scales(0.6, 5, 0, 7, samples=torch.arange(20000))
    shares = torch.bincount(drawn, minlength=6) / 20000
    assert shares[1:].tolist() == pytest.approx([0.15, 0.15, 0.15, 0.15, 0.4], abs=0.01) and shares[0] == 0
    parts = [drawn_num_scales(0.6, 5, 0, 7, samples=samples) for samples in torch.arange(20000).split(7000)]
    assert torch.equal(torch.cat(parts), drawn)
    assert not torch.equal(drawn_num_scales(0.6, 5, 0, 8, samples=torch.arange(20000)), drawn)
    assert (drawn_num_scales(0.0, 5, 0, samples=torch.arange(9)) == 5).all()
    assert set(drawn_num_scales(1.0, 2, 0, samples=torch.arange(9)).tolist()) == {1}


def test_the_task_trains_on_the_first_scales_of_the_images_drawn(fresh_accelerate):
    config = run(0.9)
    torch.manual_seed(0)
    model = build_tokenizer(config)
    task = TokenizerTask(Accelerator(cpu=True), config, model, None, None)
    batch = {"pixel_values": torch.rand(8, 3, 16, 16), "index": torch.arange(8) + 40}
    num_scales = drawn_num_scales(0.9, 3, 3, 2, samples=batch["index"])
    assert set(num_scales.tolist()) >= {1, 2}
    with torch.no_grad():
        expected = model(batch["pixel_values"], num_scales=num_scales).loss
        assert expected != model(batch["pixel_values"]).loss
    assert task.train_step([batch], step=2)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_it_is_refused_where_no_scale_can_be_dropped():
    for options in ({"layout": "tiles", "scales": None}, {"scales": [4]}):
        with pytest.raises(ValueError, match="scale_dropout is 0.5; expected 0 without two scales or more"):
            build_tokenizer(run(0.5, **options))
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"scale_dropout is .*; expected a number in \[0, 1\]"):
            run(value)
