"""A codebook that the library does not know is trained, saved, loaded and sampled with tiles and with scales."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file

from nextblock.files.fingerprints import model_fingerprint
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.tokenizer import VQVAEConfig
from nextblock.tokenizer.task import TokenizerTask, TokenizerTrainConfig
from nextblock.training.loop_config import LoopConfig

from .toy_codebook import SignVQVAE

LAYOUTS = {"tiles": {"tile": 2}, "scales": {"layout": "scales", "scales": [1, 2, 4], "num_phi": 2}}
SIZES = {"image_size": 16, "hidden_dim": 8, "vocab_size": 16, "embedding_dim": 4, "codebook_init": "data"}


def coarse_images() -> torch.Tensor:
    """Eight images (8, 3, 16, 16) of 4×4 squares, dark or bright."""
    squares = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round() * 1.2 - 0.6
    return F.interpolate(squares, scale_factor=4).expand(-1, 3, -1, -1)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def model(request) -> SignVQVAE:
    torch.manual_seed(0)
    return SignVQVAE(VQVAEConfig(**SIZES | request.param))


@pytest.fixture
def trained(model, fresh_accelerate):
    """The tokenizer after 80 steps of the library's own task, and the figures of every step."""
    config = TokenizerTrainConfig(output_dir="unused", loop=LoopConfig(num_steps=80, batch_size=8))
    config.optimizer.learning_rate = 1e-2
    task = TokenizerTask(Accelerator(cpu=True), config, model, None, None)
    pixel_values = coarse_images()
    model.initialize_codebook(pixel_values, seed=0)
    model.train()
    metrics = [task.train_step([{"pixel_values": pixel_values}], step) for step in range(80)]
    return model.eval(), metrics, pixel_values


def test_it_trains(trained):
    model, metrics, pixel_values = trained
    assert metrics[-1]["l2"] < 0.5 * metrics[0]["l2"]
    assert model.quantizer.codebook.side.grad is None and model.quantizer.codebook.side != 0.5
    idx_BL = model.img_to_idx(pixel_values)
    assert torch.equal(torch.cat(model(pixel_values).idx_Bl, 1), idx_BL) and idx_BL.unique().numel() > 4


def test_it_is_saved_and_loaded(trained, tmp_path):
    model, _, pixel_values = trained
    model.save_pretrained(tmp_path)
    assert "quantizer.codebook.side" in load_file(tmp_path / "model.safetensors")
    loaded = SignVQVAE.from_pretrained(tmp_path)
    assert model_fingerprint(loaded) == model_fingerprint(model)
    assert torch.equal(loaded.img_to_idx(pixel_values), model.img_to_idx(pixel_values))
    half = SignVQVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.quantizer.codebook.side.dtype == torch.float32
    assert torch.equal(half.quantizer.codebook.side, model.quantizer.codebook.side)


def test_it_is_sampled_and_decoded(trained):
    model, _, _ = trained
    sizes = {"vocab_size": 16, "embedding_dim": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    prior = BlockPrior(BlockPriorConfig(layout=model.layout.to_dict(), num_classes=2, **sizes)).eval()
    idx_Bl = prior.generate(torch.tensor([0, 1]), model.quantizer, generator=torch.Generator().manual_seed(0))
    assert model.idxBl_to_img(idx_Bl).shape == (2, 3, 16, 16)
    canvas, inputs = model.quantizer.start(2), []
    with torch.no_grad():
        for k, idx in enumerate(idx_Bl):
            canvas, next_input = model.quantizer.advance(canvas, idx, k)
            inputs.append(next_input)
    idx_BL = model.layout.join(idx_Bl)
    assert torch.equal(model.idx_to_var_input(idx_BL), torch.cat(inputs[:-1], 1))
    assert torch.allclose(model.quantizer.idx_to_features(idx_BL), canvas, rtol=0, atol=1e-6)


def test_what_needs_a_table_says_so(model):
    with pytest.raises(ValueError, match="the codebook is a SignCodebook, which has no table of its codes"):
        model.quantizer.get_codebook()
    with pytest.raises(ValueError, match="has no table"):
        model.quantizer.compared(torch.zeros(1, 4, 4, 4))


def test_a_configuration_of_another_size_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 24; expected 16 for a SignCodebook"):
        SignVQVAE(VQVAEConfig(**SIZES | {"vocab_size": 24}))
