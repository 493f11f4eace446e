"""Loading, saving, offloading and publishing a pipeline."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from nextblock.pipelines import ClassToImagePipeline, storage
from nextblock.prior import SamplingOptions

FRESH = """
import sys, torch
import nextblock.pipelines
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
pipe.set_progress_bar_config(disable=True)
assert type(pipe) is nextblock.pipelines.ClassToImagePipeline and pipe.prior.dtype == torch.bfloat16
print(pipe("wren", generator=torch.Generator().manual_seed(0)).images[0].size)
"""


@pytest.fixture
def pipe(build_pipeline) -> ClassToImagePipeline:
    return build_pipeline()


def test_a_fresh_process_loads_the_pipeline_by_diffusers_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "(16, 16)\n", done.stdout + done.stderr


@pytest.mark.parametrize("pipeline_class", [ClassToImagePipeline, DiffusionPipeline])
def test_dtypes_are_chosen_for_all_components_or_each(pipeline_class, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for name in ("dtype", "torch_dtype"):
        loaded = pipeline_class.from_pretrained(tmp_path, **{name: torch.bfloat16})
        assert loaded.prior.dtype == torch.bfloat16 and loaded.dtype == torch.bfloat16
        assert loaded.tokenizer.quantizer.get_codebook().dtype == torch.float32
    loaded = pipeline_class.from_pretrained(tmp_path, dtype={"prior": torch.bfloat16, "default": torch.float32})
    assert loaded.prior.dtype == torch.bfloat16 and loaded.tokenizer.dtype == torch.float32


def test_a_variant_is_saved_under_names_of_its_own(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="bf16")
    files = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert files == {"model.bf16.safetensors"}
    loaded = ClassToImagePipeline.from_pretrained(tmp_path, variant="bf16")
    for name, tensor in pipe.prior.state_dict().items():
        assert torch.equal(loaded.prior.state_dict()[name], tensor)
    with pytest.raises(OSError, match="model.safetensors"):
        ClassToImagePipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant=fp16"):
        ClassToImagePipeline.from_pretrained(tmp_path, variant="fp16")


def test_pickles_are_neither_written_nor_read(pipe, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization is False; expected True"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors is False; expected True"):
        ClassToImagePipeline.from_pretrained(tmp_path, use_safetensors=False)
    torch.save(pipe.prior.state_dict(), tmp_path / "prior/pytorch_model.bin")
    (tmp_path / "prior/model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        ClassToImagePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", {"prior": "bf16"}])
def test_dtypes_that_are_none_are_refused(dtype, tmp_path):
    for name in ("dtype", "torch_dtype"):
        with pytest.raises(ValueError, match="dtype is .*; expected a torch.dtype"):
            ClassToImagePipeline.from_pretrained(tmp_path, **{name: dtype})


class CountingHook:
    """Stands in for accelerate's hook, which would need an accelerator."""

    def __init__(self, name, order):
        self.name, self.order = name, order

    def pre_forward(self, module, *args, **kwargs):
        self.order.append(self.name)
        return args, kwargs

    def offload(self):
        self.order.append(f"{self.name} off")


def test_offloaded_models_come_in_turn_and_go(pipe, monkeypatch):
    from diffusers.pipelines import pipeline_utils

    order = []

    def cpu_offload_with_hook(model, device, prev_module_hook=None):
        name = "prior" if model is pipe.prior else "tokenizer"
        model._hf_hook = CountingHook(name, order)
        return model, model._hf_hook

    monkeypatch.setattr("accelerate.cpu_offload_with_hook", cpu_offload_with_hook)
    monkeypatch.setattr(pipeline_utils, "empty_device_cache", lambda *args: None)
    pipe.enable_model_cpu_offload(device="meta")
    monkeypatch.setattr(ClassToImagePipeline, "_execution_device", torch.device("cpu"))
    assert [hook.name for hook in pipe._all_hooks] == ["prior", "tokenizer"]
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: [hook.offload() for hook in pipe._all_hooks])
    away = ["prior off", "tokenizer off"]
    pipe([0, 1], batch_size=1, decode_batch_size=2)
    assert order == ["prior", "prior", "tokenizer", *away]
    order.clear()
    pipe(0, output_type="latent")
    assert order == ["prior", *away]
    order.clear()
    pipe.progressive(0)
    assert order == ["prior", *["tokenizer"] * 3, *away]
    order.clear()
    pipe.reconstruct(Image.new("RGB", (16, 16)))
    assert order == ["tokenizer", "tokenizer", *away]


def test_a_hub_repository_is_downloaded_once_and_read_as_a_folder(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    calls = []

    def snapshot_download(repo_id, **kwargs):
        calls.append((repo_id, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(storage, "snapshot_download", snapshot_download)
    loaded = ClassToImagePipeline.from_pretrained("someone/birds", revision="v1", dtype=torch.float32)
    (repo_id, options), *more = calls
    assert repo_id == "someone/birds" and options["revision"] == "v1" and not more
    assert options["allow_patterns"] == ["*.json", "*.safetensors", "README.md", "samples.png", "text_tokenizer/*"]
    images = [p("wren", generator=torch.Generator().manual_seed(0), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*images)


def test_the_model_card_says_what_the_pipeline_is(pipe, build_pipeline, tmp_path):
    pipe.save_pretrained(tmp_path / "plain")
    card = (tmp_path / "plain/README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header.pop("tags") == ["nextblock", "image-generation"]
    tag = "unconditional-image-generation"
    assert header == {"library_name": "diffusers", "pipeline_tag": tag, "license": "unknown"}
    num_parameters = sum(parameter.numel() for parameter in pipe.prior.parameters())
    for part in (
        "Samples 16×16 images block by block: 3 scales of 1×1, 2×2, 4×4 tokens.",
        "pipe('blue tit', num_images_per_label=4)",
        "| layout | scales, 3 blocks, 21 tokens |",
        "| codes | 12 of 8 channels, LearnedCodebook |",
        "| classes | 3 |",
        "| prior | nextblock_block_prior, 2 layers, width 16, 2 heads, head softmax |",
        f"| prior parameters | {num_parameters:,} |",
    ):
        assert part in card
    assert not any(part in card for part in ("Recipe", "Metrics", "samples.png"))
    assert "pip install nextblock" in card and "Nobody has stated a licence" in card
    pipe.save_pretrained(
        tmp_path / "full",
        recipe={"learning_rate": 1e-4, "data": "a|b"},
        metrics={"fid": 12.3456789},
        sample_images=[Image.new("RGB", (16, 16), "red")] * 3,
    )
    card = (tmp_path / "full/README.md").read_text(encoding="utf-8")
    assert "![samples](samples.png)" in card and "| learning_rate | 0.0001 |\n| data | a\\|b |" in card
    assert "## Metrics\n\n| | |\n|---|---|\n| fid | 12.3457 |" in card
    assert Image.open(tmp_path / "full/samples.png").getpixel((10, 10)) == (255, 0, 0)
    build_pipeline("rows", num_classes=0).save_pretrained(tmp_path / "rows")
    card = (tmp_path / "rows/README.md").read_text(encoding="utf-8")
    assert "pipe(4)" in card and "4 tiles of 1×4 tokens" in card and "| classes | none |" in card


def test_publishing_uploads_the_folder_with_its_card(pipe, tmp_path, monkeypatch):
    calls = []

    class FakeApi:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(self, folder_path, repo_id, commit_message, create_pr):
            files = {str(path.relative_to(folder_path)) for path in sorted(storage.Path(folder_path).rglob("*.*"))}
            calls.append(("upload", repo_id, commit_message, create_pr, files))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(storage, "HfApi", FakeApi)
    files = {"README.md", "model_index.json", "pipeline.py"} | {
        f"{name}/{file}" for name in ("prior", "tokenizer") for file in ("config.json", "model.safetensors")
    }
    address = pipe.push_to_hub("birds", commit_message="First", private=True, token="secret", metrics={"fid": 3.0})
    assert address == "https://hub/commit"
    uploaded = ("upload", "someone/birds", "First", False, files)
    assert calls == [("token", "secret"), ("create", "birds", True, True), uploaded]
    calls.clear()
    pipe.save_pretrained(tmp_path / "finches", push_to_hub=True, create_pr=True)
    uploaded = ("upload", "someone/finches", "Upload pipeline", True, files)
    assert calls == [("token", None), ("create", "finches", None, True), uploaded]
    with pytest.raises(ValueError, match=r"push_to_hub is False; expected True with \['repo_id'\]"):
        pipe.save_pretrained(tmp_path / "finches", repo_id="birds")


def test_the_cards_snippet_runs_with_the_stored_settings(pipe, tmp_path):
    stored = SamplingOptions(guidance_scale=2.0, guidance_schedule="linear", top_k=5)
    ClassToImagePipeline(tokenizer=pipe.tokenizer, prior=pipe.prior, sampling=stored).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "num_images_per_label=4, guidance_scale=2.0, guidance_schedule='linear', top_k=5)" in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/or/repository", str(tmp_path))
    names = {}
    exec(code, names)
    assert len(names["images"]) == 4 and names["pipe"].sampling == stored


@pytest.mark.parametrize("pipeline_class", [ClassToImagePipeline, DiffusionPipeline])
def test_the_card_survives_loading_and_saving(pipeline_class, pipe, tmp_path):
    card = {"recipe": {"steps": 7}, "metrics": {"fid": 3.5}, "license": "cc-by-4.0"}
    pipe.save_pretrained(tmp_path / "first", **card, sample_images=[Image.new("RGB", (16, 16), "red")])
    loaded = pipeline_class.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first, second = tmp_path / "first", tmp_path / "second"
    for name in ("README.md", "samples.png", "pipeline.py"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    text = (second / "README.md").read_text(encoding="utf-8")
    assert "| steps | 7 |" in text and "| fid | 3.5 |" in text and 'license: "cc-by-4.0"' in text
    assert "licensed under cc-by-4.0" in text and "![samples](samples.png)" in text
    # What is given counts; saving where another pipeline was leaves none of its picture.
    loaded.save_pretrained(second, metrics={"fid": 2.5})
    text = (second / "README.md").read_text(encoding="utf-8")
    assert "| fid | 2.5 |" in text and "| steps | 7 |" in text
    ClassToImagePipeline(tokenizer=pipe.tokenizer, prior=pipe.prior).save_pretrained(second)
    assert not (second / "samples.png").exists()


def test_publishing_a_loaded_pipeline_keeps_its_card(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path, metrics={"fid": 3.5}, sample_images=[Image.new("RGB", (16, 16), "red")])
    uploaded = {}

    def upload(folder, repo_id, **options):
        uploaded.update({path.name: path.read_bytes() for path in storage.Path(folder).glob("*.*")})
        return "https://hub/commit"

    monkeypatch.setattr(storage, "upload_folder", upload)
    ClassToImagePipeline.from_pretrained(tmp_path).push_to_hub("someone/birds")
    assert uploaded["samples.png"] == (tmp_path / "samples.png").read_bytes()
    text = uploaded["README.md"].decode()
    assert "| fid | 3.5 |" in text and 'from_pretrained("someone/birds")' in text
    with pytest.raises(ValueError, match="saving options are .*'colour'.*; expected some of"):
        pipe.push_to_hub("someone/birds", colour="red")


WITHOUT = """
import sys
sys.modules["nextblock"] = None
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
"""


def test_diffusers_loads_the_folder_by_the_code_in_it(pipe, tmp_path):
    folder = tmp_path / "birds"
    pipe.save_pretrained(folder)
    loaded = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert type(loaded) is ClassToImagePipeline


@pytest.mark.slow
def test_diffusers_says_what_to_install(pipe, tmp_path):
    folder = tmp_path / "birds"
    pipe.save_pretrained(folder)
    command = [sys.executable, "-c", WITHOUT, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install nextblock" in done.stderr
