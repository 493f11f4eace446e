"""`transformers.Trainer` trains a tokenizer: its output has a loss."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.losses import TokenizerLossConfig, tokenizer_losses


class Pictures(Dataset):
    """Smooth pictures."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        rows = torch.linspace(-3, 3, 16)
        waves = torch.sin(rows[:, None] * (1 + index % 3) + rows * (index % 4))
        return {"pixel_values": torch.stack([waves, -waves, waves**2])}


class UpdateCodebook(TrainerCallback):
    """What README says that codes by moving average take."""

    def on_step_end(self, args, state, control, model, **kwargs):
        model.update_codebook(args.seed, state.global_step)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_the_trainer_trains_a_tokenizer(update, make_vqvae, tmp_path):
    model = make_vqvae(image_size=16, layout="scales", scales=[1, 2, 4], num_phi=1, codebook_update=update)
    codes = model.quantizer.get_codebook().clone()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callbacks = [UpdateCodebook()] if update == "ema" else []
    trainer = Trainer(model, arguments, train_dataset=Pictures(), eval_dataset=Pictures(), callbacks=callbacks)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.95 * before
    assert not torch.equal(model.quantizer.get_codebook(), codes)
    assert trainer.predict(Pictures()).predictions[0].shape == (32, 3, 16, 16)
    trainer.save_model()
    pixel_values = Pictures()[0]["pixel_values"][None]
    assert torch.equal(VQVAE.from_pretrained(tmp_path).img_to_idx(pixel_values), model.img_to_idx(pixel_values))


def test_the_loss_is_that_of_the_training_command(make_vqvae, make_images):
    model = make_vqvae(image_size=16).train()
    images = make_images(model)
    output = model(images)
    terms = output.reconstruction, images, output.vq_loss, TokenizerLossConfig()
    assert torch.equal(output.loss, tokenizer_losses(*terms)["loss"])
    assert "loss" not in model(images, return_loss=False) and len(model(images, return_dict=False)) == 3
