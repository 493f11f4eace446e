"""What a training tells of codebooks whose index has digits, and of those too large for a histogram."""

import pytest
import torch
from accelerate import Accelerator

from nextblock.tokenizer.task import TokenizerTask, TokenizerTrainConfig, VQVAEOptions, build_tokenizer
from nextblock.training.loop_config import LoopConfig

CODEBOOKS = {
    "fsq": {"codebook": "fsq", "fsq_levels": [4, 3, 2], "embedding_dim": 3, "vocab_size": 24},
    "lfq": {"codebook": "lfq", "embedding_dim": 18, "vocab_size": 1 << 18, "codebook_digits": [64, 4096]},
}
IMAGES = 2 * torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return {"pixel_values": IMAGES[index], "class_labels": 0, "index": index}


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_a_step_and_an_evaluation_tell_the_use_of_codes_and_digits(kind, fresh_accelerate):
    layout = {"image_size": 16, "hidden_dim": 4, "layout": "scales", "scales": [1, 4], "num_phi": 1}
    config = TokenizerTrainConfig(
        output_dir="unused",
        model=VQVAEOptions(**layout | CODEBOOKS[kind]),
        loop=LoopConfig(num_steps=4, batch_size=8, keep_best="codebook/lowest_digit_entropy"),
    )
    torch.manual_seed(0)
    model = build_tokenizer(config)
    task = TokenizerTask(Accelerator(cpu=True), config, model, None, Images())
    V, idx_BL = config.model.vocab_size, model.img_to_idx(IMAGES)
    digits = model.quantizer.digits.split(idx_BL).flatten(0, 1)
    lowest = min(
        (torch.special.entr(digit.bincount(minlength=base) / len(digit)).sum() / torch.tensor(base).log()).item()
        for digit, base in zip(digits.T, model.quantizer.digits.bases, strict=True)
    )
    batches = [{"pixel_values": part} for part in IMAGES.split(4)]
    for prefix, figures in {"eval": task.evaluate(model)[0], "train": task.train_step(batches, 0)}.items():
        assert float(figures["codebook/usage"]) == pytest.approx(idx_BL.unique().numel() / V), prefix
        assert float(figures["codebook/block_0/usage"]) == pytest.approx(idx_BL[:, 0].unique().numel() / V), prefix
        assert float(figures["codebook/lowest_digit_entropy"]) == pytest.approx(lowest, rel=1e-5), prefix
        assert float(figures["codebook/digit_entropy"]) >= float(figures["codebook/lowest_digit_entropy"])
