"""Training straight from images: the same as from their tokens, and what only images allow; options of scale."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nextblock.data.images import ImageDataset
from nextblock.files.fingerprints import model_fingerprint
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior.task import PriorTask, PriorTrainConfig
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer import VQVAE
from nextblock.train_prior import train

SHORT = """
    --model.hidden_size 16 --model.num_layers 2 --model.num_heads 2 --class_dropout 0.3 --num_pictures_per_class 1
    --optimizer.learning_rate 1e-3 --loop.cpu true --loop.mixed_precision no --loop.log_every 1
    --loop.num_steps 3 --loop.batch_size 8 --loop.tracker null
""".split()
HARD = ["--model.dropout", "0.1", "--model.drop_path", "0.2", "--model.label_smoothing", "0.1"]


@pytest.fixture(scope="module")
def images(image_folder, tokenizer_dir) -> list[str]:
    """What takes the generated images."""
    folder = ["--data.source", "folder", "--data.path", str(image_folder)]
    return [*folder, "--tokenizer", str(tokenizer_dir)]


@pytest.fixture(scope="module")
def plain_tokens(run_here, images, tmp_path_factory) -> list[str]:
    """What takes the tokens of those images, each once and as it is."""
    folder = tmp_path_factory.mktemp("plain_tokens") / "new"
    run_here(tokenize, TokenizeConfig, *images, "--output_dir", folder, "--cpu", "true", "--batch_size", 8)
    return ["--tokens", str(folder), "--tokenizer", images[-1]]


@pytest.fixture(scope="module")
def train_on(run_here, tmp_path_factory):
    """Train for three steps and return the run's folder."""

    def run(*options):
        folder = tmp_path_factory.mktemp("run")
        folders = ["--output_dir", folder, "--pipeline_dir", folder / "pipeline"]
        run_here(train, PriorTrainConfig, *SHORT, *options, *folders)
        return folder

    return run


@pytest.fixture(scope="module")
def from_tokens(train_on, plain_tokens):
    """A run on tokens, with dropout of every kind."""
    return train_on(*plain_tokens, *HARD)


def states(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step_00000003" / "model.safetensors")


def assert_same_weights(folder, other, atol: float = 0.0) -> None:
    got, expected = states(folder), states(other)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=name)


def test_images_train_as_their_tokens_do(train_on, images, from_tokens, read_metrics):
    run = train_on(*images, *HARD)
    assert_same_weights(run, from_tokens)
    assert read_metrics(run) == read_metrics(from_tokens)
    assert (run / "tokens_check.png").read_bytes() == (from_tokens / "tokens_check.png").read_bytes()
    tokenizer = VQVAE.from_pretrained(images[-1]).state_dict()
    exported = ClassToImagePipeline.from_pretrained(run / "pipeline", requires_own_tokenizer=True)
    assert exported.prior.config.tokenizer_fingerprint == model_fingerprint(exported.tokenizer)
    assert exported.prior.config.class_names == ["blue tit", "great tit", "wren"]
    assert all(torch.equal(tensor, tokenizer[name]) for name, tensor in exported.tokenizer.state_dict().items())


def test_the_first_rows_are_decoded_before_the_first_step(from_tokens, image_folder):
    """The first cell is the first training image as the tokenizer reconstructs it, enlarged four times."""
    with Image.open(from_tokens / "tokens_check.png") as picture:
        grid = np.asarray(picture, dtype=float)
    assert grid.shape == (2 * 66 + 2, 10 * 66 + 2, 3)
    tokenizer = VQVAE.from_pretrained(from_tokens / "pipeline" / "tokenizer")
    with Image.open(sorted((image_folder / "train" / "blue tit").iterdir())[0]) as first:
        pixel_values = torch.tensor(np.asarray(first) / 127.5 - 1).permute(2, 0, 1)[None].float()
    decoded = tokenizer.idxBl_to_img(tokenizer.img_to_idxBl(pixel_values))[0].permute(1, 2, 0).numpy()
    shown = grid[2:66:4, 2:66:4] / 127.5 - 1
    np.testing.assert_allclose(shown, decoded, atol=1 / 127)


def test_augmented_images_are_new_in_every_epoch(train_on, images, from_tokens, monkeypatch):
    seen = []
    take = ImageDataset.__getitems__

    def noted(self, keys):
        seen.extend((self.transform.is_random, key) for key in keys)
        return take(self, keys)

    monkeypatch.setattr(ImageDataset, "__getitems__", noted)
    run = train_on(*images, *HARD, "--transform.max_shift", 3, "--loop.num_steps", 7)
    training = {key for is_random, key in seen if is_random and isinstance(key, tuple)}
    assert {epoch for epoch, _ in training} == {0, 1} and len(training) > 48
    # Held-out images are never varied.
    assert {key for is_random, key in seen if not is_random} == set(range(15))
    metrics = [(folder / "metrics.jsonl").read_text().splitlines()[0] for folder in (run, from_tokens)]
    assert metrics[0] != metrics[1]


def test_images_are_encoded_in_a_precision_of_their_own(train_on, images, monkeypatch):
    dtypes = []
    encode = VQVAE.encode

    def noted(self, pixel_values):
        features = encode(self, pixel_values)
        dtypes.append((features.dtype, torch.is_grad_enabled(), self.training))
        return features

    monkeypatch.setattr(VQVAE, "encode", noted)
    run = train_on(*images, "--tokenizer_dtype", "bfloat16", "--loop.num_steps", 1)
    assert set(dtypes) == {(torch.bfloat16, False, False)} and len(dtypes) == 3
    exported = load_file(run / "pipeline" / "tokenizer" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    dtypes.clear()
    train_on(*images, "--loop.mixed_precision", "bf16", "--loop.num_steps", 1)
    assert set(dtypes) == {(torch.float32, False, False)}


def test_images_resume_exactly(train_on, images, run_here, monkeypatch):
    options = [*images, *HARD, "--transform.max_shift", 3, "--loop.save_every", 2]
    whole, train_step = train_on(*options), PriorTask.train_step

    def interrupted(self, micro_batches, step):
        if step == 2:
            raise KeyboardInterrupt
        return train_step(self, micro_batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(PriorTask, "train_step", interrupted)
        broken = whole.parent / "broken"
        folders = ["--output_dir", broken, "--pipeline_dir", broken / "pipeline"]
        with pytest.raises(KeyboardInterrupt):
            run_here(train, PriorTrainConfig, *SHORT, *options, *folders)
    run_here(train, PriorTrainConfig, *SHORT, *options, *folders, "--loop.resume_from_checkpoint", "latest")
    assert_same_weights(broken, whole)


def test_images_without_classes_and_without_a_held_out_split(train_on, plain_image_folder, tokenizer_dir):
    folder = ["--data.source", "folder", "--data.path", plain_image_folder, "--tokenizer", tokenizer_dir]
    run = train_on(*folder, "--data.eval_split", "null", "--class_dropout", 0)
    assert ClassToImagePipeline.from_pretrained(run / "pipeline").prior.config.num_classes == 0
    assert "eval/loss" not in (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "t"], "tokens is None and data is None; expected exactly one of them"),
        (["--tokenizer", "t", "--tokens", "x", "--data.source", "digits"], "tokens is 'x' and data is ImageDataConfig"),
        (["--tokenizer", "t", "--tokens", "x", "--transform.max_shift", "2"], "transform is TransformConfig"),
        (["--tokenizer", "t", "--tokens", "x", "--tokenizer_dtype", "float16"], "tokenizer_dtype is 'float16'"),
        (["--tokenizer", "t", "--tokens", "x", "--loss_chunk_size", "0"], "loss_chunk_size is 0; expected at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run_here, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        run_here(train, PriorTrainConfig, *options, "--output_dir", tmp_path, "--pipeline_dir", tmp_path)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


# Options of scale


def test_chunks_train_as_whole_logits_do(train_on, plain_tokens, from_tokens, read_metrics):
    run = train_on(*plain_tokens, *HARD, "--loss_chunk_size", 50)
    # AdamW in float32 turns the rounding of a small gradient into a step of the learning rate's size.
    assert_same_weights(run, from_tokens, atol=1e-4)
    for line, expected in zip(read_metrics(run), read_metrics(from_tokens), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_checkpointed_layers_train_as_others_do(train_on, plain_tokens, from_tokens, read_metrics):
    run = train_on(*plain_tokens, *HARD, "--gradient_checkpointing", "true")
    assert_same_weights(run, from_tokens)
    assert read_metrics(run) == read_metrics(from_tokens)


def test_both_go_with_bf16_and_accumulation(train_on, plain_tokens, read_metrics):
    options = [*plain_tokens, *HARD, "--loop.mixed_precision", "bf16", "--loop.gradient_accumulation_steps", 2]
    plain, both = (
        train_on(*options, *more) for more in ([], ["--loss_chunk_size", 30, "--gradient_checkpointing", "true"])
    )
    for line, expected in zip(read_metrics(both), read_metrics(plain), strict=True):
        assert line == pytest.approx(expected, rel=1e-2, abs=1e-3)


@pytest.mark.slow
def test_a_compiled_training_equals_an_uncompiled_one(train_on, plain_tokens, read_metrics):
    plain, compiled = (train_on(*plain_tokens, "--torch_compile", value) for value in ("false", "true"))
    assert_same_weights(compiled, plain, atol=1e-4)
    for line, expected in zip(read_metrics(compiled), read_metrics(plain), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
