"""Tokenizer training end to end: exact resumption, process counts, accumulation, and what a run leaves."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import load_file

from nextblock.data.augment import TransformConfig
from nextblock.data.image_folder import scan_image_folder
from nextblock.data.images import ImageDataConfig, ImageDataset, collate, load_source
from nextblock.evaluation.metrics import psnr
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.task import TokenizerTask, TokenizerTrainConfig
from nextblock.train_tokenizer import main, train
from nextblock.training.accelerator import build_accelerator
from nextblock.training.alarms import CodeUsage
from nextblock.training.average import saved_average
from nextblock.training.loop_config import LoopConfig

# Two micro-batches a step, dropout, revival and a moving-average codebook.
HARD = ["--loop.gradient_accumulation_steps", "2", "--model.num_res_blocks", "1", "--model.dropout", "0.1"]
HARD += ["--model.hidden_dim", "16"]


@pytest.fixture(scope="module")
def train_here(run_here, tokenizer_arguments):
    """Train a tiny tokenizer in this process."""

    def run(output_dir: Path, *options) -> TokenizerTrainConfig:
        arguments = [*tokenizer_arguments, "--output_dir", output_dir, *options]
        return run_here(train, TokenizerTrainConfig, *arguments)

    return run


@pytest.fixture(scope="module")
def alone(train_here, tmp_path_factory) -> Path:
    """A run on one process, without dropout."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_here(folder)
    return folder


@pytest.fixture(scope="module")
def launched(launch_two, tokenizer_arguments, tmp_path_factory) -> Path:
    """The same run on two processes, launched from another folder."""
    folder = tmp_path_factory.mktemp("launched")
    arguments = [*tokenizer_arguments, "--loop.tracker", "null", "--output_dir", "run"]
    launch_two("train-tokenizer", *arguments, cwd=folder)
    return folder / "run"


def held_out(image_folder: Path) -> torch.Tensor:
    source = load_source(ImageDataConfig(source="folder", path=str(image_folder)), "test")
    images = ImageDataset(source, (16, 16), TransformConfig(), seed=0)
    return collate([images[index] for index in range(len(images))])["pixel_values"]


def test_an_interrupted_training_equals_an_uninterrupted_one(
    train_here, tmp_path, monkeypatch, assert_same_state, read_metrics
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_here(whole, *HARD)
    train_step = TokenizerTask.train_step

    def interrupted(self, micro_batches, step):
        if step == 4:
            raise KeyboardInterrupt
        return train_step(self, micro_batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTask, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_here(broken, *HARD)
    assert not (broken / "model.safetensors").exists()
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["step_00000003"]
    train_here(broken, *HARD, "--loop.resume_from_checkpoint", "latest")
    assert_same_state(broken, whole, step=6)
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert read_metrics(broken) == read_metrics(whole)
    train_here(tmp_path / "unrevived", *HARD, "--model.revival_threshold", 0)
    states = [load_file(tmp_path / run / "model.safetensors") for run in ("whole", "unrevived")]
    codes = [state["quantizer.codebook.weight"] for state in states]
    assert (codes[0] - codes[1]).abs().max() > 0.01


def test_two_processes_equal_one(launched, alone, assert_same_state, read_metrics):
    manifest = json.loads((launched / "checkpoints" / "step_00000006" / "checkpoint.json").read_text())
    assert manifest["num_processes"] == 2
    # AdamW in float32 turns the rounding of a small gradient into a step of the learning rate's size.
    assert_same_state(launched, alone, step=6, atol=1e-4)
    got, expected = load_file(launched / "model.safetensors"), load_file(alone / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-4, msg=name)
    for line, other in zip(read_metrics(launched), read_metrics(alone), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_two_processes_with_dropout_resume_exactly(two_process_runs, assert_same_state, read_metrics):
    whole, resumed = two_process_runs / "tokenizer_whole", two_process_runs / "tokenizer_resumed"
    for run in (whole, resumed):
        manifest = json.loads((run / "checkpoints" / "step_00000006" / "checkpoint.json").read_text())
        assert manifest["num_processes"] == 2 and "random_states_1.pkl" in manifest["sha256"]
    assert_same_state(resumed, whole, step=6)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert read_metrics(resumed) == read_metrics(whole)


def test_another_number_of_processes_is_refused(launched, train_here):
    with pytest.raises(ValueError, match="saved by 2 processes; expected the same number to resume it, got 1"):
        train_here(launched, "--loop.resume_from_checkpoint", "latest")


def test_a_run_leaves_metrics_pictures_events_and_its_configuration(alone, train_here, read_metrics):
    lines = read_metrics(alone)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    terms = {"loss", "l1", "l2", "vq", "grad_norm", "learning_rate"}
    prefixes = ["codebook/", *(f"codebook/block_{k}/" for k in range(3))]
    code_use = {prefix + name for prefix in prefixes for name in ("usage", "perplexity", "num_dead_codes")}
    terms |= code_use
    for line in lines[:-1]:
        assert line.keys() == {"step"} | {f"train/{name}" for name in terms}
        assert line["train/loss"] == pytest.approx(line["train/l1"] + line["train/l2"] + line["train/vq"])
    assert lines[0]["train/learning_rate"] == 1e-3 and lines[5]["train/learning_rate"] == 0
    assert lines[-1].keys() == {"step", "eval/psnr", *(f"eval/{name}" for name in code_use)}
    with Image.open(alone / "pictures" / "reconstructions_00000006.png") as picture:
        assert picture.size == (10 * 66 + 2, 2 * 66 + 2)
    assert len(list((alone / "logs" / "nextblock").glob("events.out.tfevents.*"))) == 1
    assert {path.name for path in alone.iterdir()} == {
        *("checkpoints", "logs", "pictures"),
        *("config.json", "config.yaml", "metrics.jsonl", "model.safetensors", "run.json"),
        *("source-train.npz", "source-test.npz"),
    }


def test_the_saved_configuration_repeats_the_run(alone, run_here, tmp_path, read_metrics):
    arguments = ["--config", alone / "config.yaml", "--output_dir", tmp_path / "again"]
    run_here(train, TokenizerTrainConfig, *arguments)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert read_metrics(tmp_path / "again") == read_metrics(alone)


def test_the_exported_tokenizer_is_the_weight_average(alone, image_folder, read_metrics):
    exported = VQVAE.from_pretrained(alone)
    checkpoint = alone / "checkpoints" / "step_00000006"
    average = VQVAE(exported.config).eval()
    average.load_state_dict(saved_average(checkpoint))
    assert load_file(checkpoint / "average.safetensors")["num_updates"] == 6
    raw = load_file(alone / "checkpoints" / "step_00000006" / "model.safetensors")
    assert not torch.equal(raw["quantizer.codebook.weight"], exported.quantizer.codebook.weight)
    pixel_values = held_out(image_folder)
    got, expected = exported.img_to_idxBl(pixel_values), average.img_to_idxBl(pixel_values)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    images = exported.idxBl_to_img(got)
    assert torch.equal(images, average.idxBl_to_img(expected))
    last = read_metrics(alone)[-1]
    assert last["eval/psnr"] == pytest.approx(psnr(images, pixel_values).mean().item(), abs=1e-4)


def test_training_reconstructs_better_and_better(train_here, tmp_path, read_metrics):
    options = ["--loop.num_steps", 60, "--loop.ema_decay", 0.9, "--optimizer.learning_rate", 1e-2]
    options += ["--model.hidden_dim", 32, "--loop.save_every", "null", "--loop.tracker", "null"]
    train_here(tmp_path, *options, "--loop.eval_every", 30)
    lines = read_metrics(tmp_path)
    errors = [line["train/l2"] for line in lines if "train/l2" in line]
    assert sum(errors[-10:]) / 10 < 0.7 * sum(errors[:3]) / 3
    psnrs = [line["eval/psnr"] for line in lines if "eval/psnr" in line]
    assert len(psnrs) == 2 and psnrs[1] > psnrs[0] > 12


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_micro_batches_add_up_to_the_batch(update, image_folder, fresh_accelerate):
    data = ImageDataConfig(source="folder", path=str(image_folder))
    options = {"codebook_update": update, "codebook_ema_decay": 0.8, "revival_threshold": 0.3}
    options |= {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 24, "codebook_init": "data"}
    model_config = VQVAEConfig(layout="scales", scales=[1, 2, 4], num_phi=2, **options)
    images = ImageDataset(load_source(data, "train"), (16, 16), TransformConfig(), seed=0)
    states, metrics = [], []
    for n in (1, 2, 4):
        torch.manual_seed(0)
        config = TokenizerTrainConfig(output_dir="unused", loop=LoopConfig(num_steps=4, batch_size=8))
        task = TokenizerTask(Accelerator(cpu=True), config, VQVAE(model_config).double(), images, None)
        task.model.train()
        for step in range(3):
            batch = collate([images[8 * step + i] for i in range(8)])["pixel_values"].double()
            if step == 0:
                task.model.initialize_codebook(batch, 0)
            metrics.append(task.train_step([{"pixel_values": part} for part in batch.chunk(n)], step))
        states.append(task.model.state_dict())
    for i, state in enumerate(states[1:], start=1):
        for name, tensor in states[0].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-11, msg=name)
        for step in range(3):
            for name in ("loss", "l1", "l2", "vq", "grad_norm", "codebook/perplexity", "codebook/num_dead_codes"):
                torch.testing.assert_close(metrics[3 * i + step][name], metrics[step][name], rtol=0, atol=1e-10)
            for name in ("codebook/block_2/perplexity", "codebook/block_1/usage"):
                assert metrics[3 * i + step][name] == metrics[step][name]


def test_code_use_is_logged_for_each_block(fresh_accelerate):
    torch.manual_seed(0)
    options = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 24, "codebook_init_scale": 0.3}
    model = VQVAE(VQVAEConfig(layout="scales", scales=[1, 2, 4], num_phi=2, **options)).train()
    task = TokenizerTask(Accelerator(cpu=True), TokenizerTrainConfig(output_dir="unused"), model, [], None)
    pixel_values = 2 * torch.rand(8, 3, 16, 16) - 1
    idx_Bl = model.img_to_idxBl(pixel_values)
    metrics = task.train_step([{"pixel_values": part} for part in pixel_values.chunk(2)], 0)
    for prefix, idx in [("", torch.cat(idx_Bl, 1)), *((f"block_{k}/", idx) for k, idx in enumerate(idx_Bl))]:
        shares = idx.unique(return_counts=True)[1].double() / idx.numel()
        assert metrics[f"codebook/{prefix}usage"].item() == pytest.approx(len(shares) / 24)
        assert metrics[f"codebook/{prefix}num_dead_codes"] == 24 - len(shares)
        entropy = -(shares * shares.log()).sum()
        assert metrics[f"codebook/{prefix}perplexity"].item() == pytest.approx(entropy.exp().item())
    assert metrics["codebook/block_0/usage"] < metrics["codebook/block_2/usage"]
    # Of all images of a step, over processes and micro-batches.
    assert task.code_usage == CodeUsage(num_codes=24, num_tokens=[64, 4 * 64, 16 * 64])


def test_a_collapse_rings_the_alarm(alone, train_here, tmp_path, monkeypatch):
    train_step = TokenizerTask.train_step

    def dying(self, micro_batches, step):
        if step == 2:
            torch.nn.init.zeros_(self.model.encoder[-1].weight)
        return train_step(self, micro_batches, step)

    monkeypatch.setattr(TokenizerTask, "train_step", dying)
    train_here(tmp_path, "--loop.num_steps", 3, "--loop.tracker", "null")
    alarms = [json.loads(text)["alarm"] for text in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    # Block 0 never used more than one code, of images that are alike.
    places = ["block 1 of the codebook", "block 2 of the codebook", "the codebook"]
    assert [alarm.split(" uses ")[0] for alarm in alarms] == [f"step 3: {place}" for place in places]
    assert not (alone / "alarms.jsonl").exists()


def test_codes_are_not_decayed(fresh_accelerate):
    model = VQVAE(VQVAEConfig(image_size=16, hidden_dim=4, embedding_dim=4))
    task = TokenizerTask(Accelerator(cpu=True), TokenizerTrainConfig(output_dir="unused"), model, [], None)
    assert [group["weight_decay"] for group in task.optimizer.param_groups] == [0.05, 0.0]
    weight = model.quantizer.codebook.weight
    found = [any(p is weight for p in group["params"]) for group in task.optimizer.param_groups]
    assert found == [False, True]


def test_codes_start_as_the_same_features_on_every_process(image_folder, fresh_accelerate):
    data = ImageDataConfig(source="folder", path=str(image_folder))
    images = ImageDataset(load_source(data, "train"), (16, 16), TransformConfig(max_shift=1), seed=0)
    options = {"num_res_blocks": 1, "dropout": 0.5, "codebook_init": "data", "hidden_dim": 8, "embedding_dim": 4}
    config = TokenizerTrainConfig(output_dir="unused", num_init_images=6)
    codebooks = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model = VQVAE(VQVAEConfig(image_size=16, vocab_size=24, **options))
        task = TokenizerTask(Accelerator(cpu=True), config, model, images, None)
        torch.manual_seed(seed)  # Generators differ between processes.
        task.start()
        assert task.model.training
        codebooks.append(task.model.quantizer.codebook.weight.detach().clone())
    assert torch.equal(*codebooks)
    batch = collate([images[(0, index)] for index in range(len(images))])["pixel_values"]
    features = task.model.eval().encode(batch).permute(0, 2, 3, 1).reshape(-1, 4)
    distances = (codebooks[0][:, None] - features).abs().amax(2)
    assert distances.amin(1).max() < 1e-6
    assert len(codebooks[0].unique(dim=0)) == 24


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_images_that_codes_start_from_are_encoded_a_few_at_a_time_and_shared(
    num_processes, image_folder, fresh_accelerate, monkeypatch
):
    data = ImageDataConfig(source="folder", path=str(image_folder))
    images = ImageDataset(load_source(data, "train"), (16, 16), TransformConfig(), seed=0)
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(image_size=16, codebook_init="data", hidden_dim=8, embedding_dim=4, vocab_size=24))
    config = TokenizerTrainConfig(output_dir="unused", num_init_images=11)
    monkeypatch.setattr("nextblock.tokenizer.modeling_vqvae.ENCODED_PIXELS", 3 * 16 * 16)
    sizes, shares, encode = [], [], model.encode
    monkeypatch.setattr(model, "encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr("nextblock.tokenizer.task.all_reduced", lambda tensor: tensor)
    task = TokenizerTask(Accelerator(cpu=True), config, model, images, None)
    for rank in range(num_processes):
        monkeypatch.setattr("nextblock.tokenizer.task.rank_and_world_size", lambda rank=rank: (rank, num_processes))
        shares.append(task._features(model, list(range(11))))
    assert sorted(sizes) == [2, 3, 3, 3]
    whole = collate([images[(0, index)] for index in range(11)])["pixel_values"]
    expected = torch.cat([encode(part) for part in whole.split(3)])
    assert torch.equal(sum(shares), expected)
    # The model's own method takes no more at once.
    sizes.clear()
    model.initialize_codebook(whole, seed=0)
    assert max(sizes) == 3 and sum(sizes) == 11


def test_uniform_codes_stay_as_they_were_drawn(image_folder, fresh_accelerate):
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(image_size=16, hidden_dim=4, embedding_dim=4))
    before = model.quantizer.codebook.weight.detach().clone()
    task = TokenizerTask(Accelerator(cpu=True), TokenizerTrainConfig(output_dir="unused"), model, [], None)
    task.start()
    assert torch.equal(task.model.quantizer.codebook.weight, before)


def test_bf16_runs_on_the_cpu_and_exports_float32(train_here, tmp_path, read_metrics):
    tiles = ["--model.layout", "tiles", "--model.scales", "null", "--model.tile", "2"]
    train_here(tmp_path, "--loop.mixed_precision", "bf16", *tiles)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "model.safetensors").values())
    lines = read_metrics(tmp_path)
    assert all(0 < line["train/loss"] < 10 for line in lines[:-1]) and lines[-1]["eval/psnr"] > 3
    assert VQVAE.from_pretrained(tmp_path).layout.num_blocks == 4


def test_training_without_held_out_images(train_here, tmp_path, read_metrics):
    train_here(tmp_path, "--data.eval_split", "null", "--loop.ema_decay", "null", "--loop.num_steps", 2)
    assert read_metrics(tmp_path)[-1] == {"step": 2}
    assert list((tmp_path / "pictures").iterdir()) == []
    raw = load_file(tmp_path / "checkpoints" / "step_00000002" / "model.safetensors")
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in raw.items())


def test_the_command_works_in_another_folder(tokenizer_arguments, tmp_path, monkeypatch, fresh_accelerate):
    monkeypatch.chdir(tmp_path)
    main([*tokenizer_arguments, "--loop.num_steps", "1", "--output_dir", "run"])
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_wrong_options_end_the_command_with_a_message(train_here, tmp_path, capsys):
    for wrong, message in (
        (["--loop.batchsize", 8], "loop.batchsize"),
        (["--model.autoencoder", "vqvae"], "model.autoencoder"),
        (["--loop.num_steps", 0], "num_steps is 0; expected at least 1"),
        (["--eval_batch_size", 0], "eval_batch_size is 0; expected at least 1"),
        (["--optimizer.schedule", "step"], "optimizer.schedule"),
        (["--loss.l1_weight", -1], "l1_weight is -1.0; expected at least 0"),
        (["--config", "nowhere"], "'nowhere' is neither a file nor a shipped config"),
        (["--gradient_checkpointing", "true"], "gradient_checkpointing is True; expected False with model.num_res_b"),
        (["--torch_compile", "true"], "torch_compile is True; expected False with model.num_res_blocks 0"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            train_here(tmp_path, *wrong)
        assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_configurations_that_do_not_fit_are_refused(train_here, tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for wrong, message in (
        (["--loop.batch_size", 9, "--loop.gradient_accumulation_steps", 2], "batch_size is 9; expected a multiple"),
        (["--loop.batch_size", 49], "batch_size is 49; expected 1 to 48, the size of the data set"),
        (["--loop.mixed_precision", "fp16"], "mixed_precision is 'fp16'; expected 'bf16' or 'no' on a CPU"),
        (["--data.path", tmp_path / "empty", "--data.eval_split", "null"], "holds no images"),
        (["--data.path", tmp_path / "nowhere"], "is not a folder"),
        (["--data.split", "nowhere"], "is not a sub-folder"),
        (["--model.image_size", 18], "image_size is .* divisible by 4"),
    ):
        with pytest.raises(ValueError, match=message):
            train_here(tmp_path / "run", *wrong)


def test_a_sharding_launch_is_refused(train_here, tmp_path, monkeypatch):
    # On a CPU accelerate takes FSDP for DDP, silently.
    def sharding(*args):
        accelerator = build_accelerator(*args)
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        return accelerator

    monkeypatch.setattr("nextblock.training.opened_run.build_accelerator", sharding)
    with pytest.raises(ValueError, match="distributed_type FSDP; expected MULTI_GPU.*trained whole on every GPU"):
        train_here(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_show_images_of_every_class(image_folder, tokenizer_dir):
    data = ImageDataset(scan_image_folder(image_folder, "test"), 16, TransformConfig(), seed=0)
    shown = []

    class NotedData:
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            shown.append(int(collate([data[index]])["class_labels"][0]))
            return data[index]

    config, accelerator = SimpleNamespace(num_pictures=6), SimpleNamespace(device=torch.device("cpu"))
    task = SimpleNamespace(config=config, eval_data=NotedData(), accelerator=accelerator)
    with torch.no_grad():
        TokenizerTask._draw(task, VQVAE.from_pretrained(tokenizer_dir))
    assert shown == [0, 0, 1, 1, 2, 2]
