"""Models on disk: weights that are not the model's are refused by name, and a save leaves nothing of an older one."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from nextblock.data.blocks import BlockLayout
from nextblock.files.stored_model import check_memory, read_stored_weights
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.training.initial_weights import load_initial_weights

SIZES = {"vocab_size": 12, "embedding_dim": 4}


def make_tokenizer(seed: int = 0, **options) -> VQVAE:
    torch.manual_seed(seed)
    return VQVAE(VQVAEConfig(image_size=8, hidden_dim=8, tile=1, **SIZES | options)).eval()


def make_prior(seed: int = 0, **options) -> BlockPrior:
    torch.manual_seed(seed)
    sizes = SIZES | {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_classes": 3} | options
    return BlockPrior(BlockPriorConfig(layout=BlockLayout.tiles(1, 2).to_dict(), **sizes)).eval()


MODELS = {"tokenizer": make_tokenizer, "prior": make_prior}
any_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def rewrite(path: Path, change) -> None:
    """Save the tensors of a file as a function of name and tensor gives them; None leaves one out."""
    pairs = [change(name, tensor) for name, tensor in load_file(path).items()]
    save_file(dict(pair for pair in pairs if pair is not None), path, {"format": "pt"})


def save_in_shards(model, folder, **options) -> list[Path]:
    model.save_pretrained(folder, max_shard_size="1KB", **options)
    shards = sorted(folder.glob("model*-of-*.safetensors"))
    assert len(shards) > 2
    return shards


def same(model, other) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@any_model
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model."])
@pytest.mark.parametrize("by_auto_class", [False, True])
def test_names_with_a_wrappers_prefix_are_refused(make, prefix, by_auto_class, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda name, tensor: (prefix + name, tensor))
    name = sorted(model.state_dict())[0]
    with pytest.raises(ValueError, match=rf"(?s)missing: {name}.*unexpected: {prefix}{name}"):
        (AutoModel if by_auto_class else type(model)).from_pretrained(tmp_path)


@any_model
def test_each_tensor_that_is_wrong_is_named(make, tmp_path):
    model = make()
    lost, misshapen = sorted(model.state_dict())[1:3]

    def spoil(name, tensor):
        if name == lost:
            return None
        return name, torch.zeros(7, 5) if name == misshapen else tensor

    model.save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda name, tensor: (name.replace(lost, f"{lost}s"), tensor))
    with pytest.raises(ValueError, match=f"missing: {lost}\n  unexpected: {lost}s$"):
        type(model).from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", spoil)
    shape = re.escape(str(tuple(model.state_dict()[misshapen].shape)))
    with pytest.raises(ValueError, match=rf"missing: {lost}\n  misshapen: {misshapen} \(7, 5\), expected {shape}$"):
        type(model).from_pretrained(tmp_path)


@any_model
@pytest.mark.parametrize("variant", [None, "bf16"])
def test_shards_and_variants_are_refused_alike(make, variant, tmp_path):
    model = make()
    shards = save_in_shards(model, tmp_path, variant=variant)
    assert same(type(model).from_pretrained(tmp_path, variant=variant), model)
    lost = sorted(load_file(shards[1]))[0]
    rewrite(shards[1], lambda name, tensor: (f"x.{name}", tensor) if name == lost else (name, tensor))
    with pytest.raises(ValueError, match=f"(?s)missing: {lost}\n.*unexpected: x.{lost}"):
        type(model).from_pretrained(tmp_path, variant=variant)
    shards[0].unlink()
    with pytest.raises((OSError, ValueError), match=shards[0].name):
        type(model).from_pretrained(tmp_path, variant=variant)


@pytest.mark.parametrize("pipeline_class", [ClassToImagePipeline, DiffusionPipeline])
@pytest.mark.parametrize("component", ["prior", "tokenizer"])
def test_a_pipeline_refuses_components_without_their_weights(pipeline_class, component, tmp_path):
    ClassToImagePipeline(tokenizer=make_tokenizer(), prior=make_prior()).save_pretrained(tmp_path)
    rewrite(tmp_path / component / "model.safetensors", lambda name, tensor: (f"_orig_mod.{name}", tensor))
    with pytest.raises(ValueError, match="unexpected: _orig_mod"):
        pipeline_class.from_pretrained(tmp_path)


def test_a_model_below_an_adapter_is_checked_too(tmp_path):
    model = make_prior()
    model.save_pretrained(tmp_path)
    model.add_adapter(LoraConfig(target_modules=["mat_qkv"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert same(BlockPrior.from_pretrained(tmp_path), model)
    rewrite(tmp_path / "model.safetensors", lambda name, tensor: (f"_orig_mod.{name}", tensor))
    with pytest.raises(ValueError, match="(?s)missing: blocks.0.*unexpected: _orig_mod"):
        BlockPrior.from_pretrained(tmp_path)
    make_prior().save_pretrained(tmp_path / "other")
    for path in tmp_path.glob("adapter*"):
        path.rename(tmp_path / "other" / path.name)
    adapter = tmp_path / "other/adapter_model.safetensors"
    rewrite(adapter, lambda name, tensor: (name.replace("blocks.0", "blocks.7"), tensor))
    with pytest.raises(ValueError, match="(?s)missing: blocks.0.*lora_A"):
        BlockPrior.from_pretrained(tmp_path / "other")


def test_what_a_load_asks_for_by_name_is_granted(tmp_path):
    make_prior().save_pretrained(tmp_path / "prior")
    config = make_prior(num_classes=5).config
    with pytest.raises(ValueError, match=r"misshapen: class_emb.weight \(4, 16\), expected \(6, 16\)"):
        BlockPrior.from_pretrained(tmp_path / "prior", config=config)
    model, info = BlockPrior.from_pretrained(
        tmp_path / "prior", config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(model.class_emb.weight) == 6 and len(info["mismatched_keys"]) == 1
    make_tokenizer(codebook_update="ema").save_pretrained(tmp_path / "ema")
    assert VQVAE.from_pretrained(tmp_path / "ema", codebook_update="gradient").config.codebook_update == "gradient"
    make_tokenizer().save_pretrained(tmp_path / "gradient")
    revived = VQVAE.from_pretrained(tmp_path / "gradient", revival_threshold=0.1)
    assert torch.equal(revived.quantizer.codebook.code_counts, torch.ones(12))
    lost = "quantizer.codebook.code_sums"
    rewrite(tmp_path / "ema/model.safetensors", lambda name, tensor: None if name == lost else (name, tensor))
    for loader in (VQVAE, AutoModel):
        with pytest.raises(ValueError, match=f"missing: {lost}$"):
            loader.from_pretrained(tmp_path / "ema")
        assert loader.from_pretrained(tmp_path / "ema", codebook_update="gradient")
    # Weights without their configuration, under one that is given.
    config = VQVAEConfig.from_pretrained(tmp_path / "ema")
    (tmp_path / "ema/config.json").unlink()
    with pytest.raises(ValueError, match=f"missing: {lost}$"):
        VQVAE.from_pretrained(tmp_path / "ema", config=config)


@any_model
@pytest.mark.parametrize("variant", [None, "bf16"])
@pytest.mark.parametrize("is_sharded_first", [True, False])
def test_the_last_save_is_loaded_and_nothing_else_is_left(make, variant, is_sharded_first, tmp_path):
    old, new = make(seed=1), make(seed=2)
    saves = [lambda model: save_in_shards(model, tmp_path, variant=variant)]
    saves.insert(0 if not is_sharded_first else 1, lambda model: model.save_pretrained(tmp_path, variant=variant))
    (tmp_path / "notes.txt").write_text("mine")
    other = make(seed=3)
    other.save_pretrained(tmp_path, variant="mine")
    for save, model in zip(saves, (old, new), strict=True):
        save(model)
        assert same(type(model).from_pretrained(tmp_path, variant=variant), model)
    names = {path.name for path in tmp_path.iterdir()}
    part = "" if variant is None else f".{variant}"
    assert (f"model{part}.safetensors" in names) == is_sharded_first
    assert (f"model.safetensors.index{part}.json" in names) != is_sharded_first
    assert any(f"model{part}-0" in name for name in names) != is_sharded_first
    assert not any(name.startswith(".") for name in names)
    # Other variants and other people's files stay.
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert same(type(model).from_pretrained(tmp_path, variant="mine"), other)


def test_fewer_shards_replace_more(tmp_path):
    save_in_shards(make_prior(seed=1), tmp_path)
    new = make_prior(seed=2)
    new.save_pretrained(tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())
    assert same(BlockPrior.from_pretrained(tmp_path), new)


def test_a_pipelines_components_replace_older_ones(tmp_path):
    old, new = (ClassToImagePipeline(tokenizer=make_tokenizer(s), prior=make_prior(s)) for s in (1, 2))
    old.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path, max_shard_size="1KB")
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert same(loaded.prior, new.prior) and same(loaded.tokenizer, new.tokenizer)
    old.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.rglob("model*")} == {"model_index.json", "model.safetensors"}
    assert same(ClassToImagePipeline.from_pretrained(tmp_path).prior, old.prior)


@any_model
def test_a_save_that_fails_leaves_the_older_one_whole(make, tmp_path, monkeypatch):
    save_in_shards(make(seed=1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = []

    def fill_the_disk(tensors, path, **options):
        written.append(path)
        if len(written) == 2:
            raise OSError("no space left")
        save_file(tensors, path, **options)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        make(seed=2).save_pretrained(tmp_path, max_shard_size="2KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_may_be_saved_over_the_files_it_was_loaded_from(tmp_path):
    model = make_prior()
    model.save_pretrained(tmp_path)
    loaded = BlockPrior.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert same(loaded, model) and same(BlockPrior.from_pretrained(tmp_path), model)


def test_a_model_of_compiled_parts_is_saved_under_its_own_names(tmp_path):
    model, plain = make_prior(), make_prior()
    model.blocks[0] = torch.compile(model.blocks[0])
    model.head = torch.compile(model.head)
    model.save_pretrained(tmp_path)
    assert same(BlockPrior.from_pretrained(tmp_path), plain)


def test_folders_that_cannot_hold_the_model_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds adapter_config.json.*; expected a folder without an adapter"):
        make_prior().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save_directory is .*, a file; expected a folder"):
        make_prior().save_pretrained(tmp_path / "adapter_config.json")


def test_initial_weights_come_from_the_files_that_a_load_takes(tmp_path):
    model = make_prior(seed=1)
    make_prior(seed=3).save_pretrained(tmp_path, variant="old")
    save_in_shards(model, tmp_path)
    own = make_prior(seed=2)
    load_initial_weights(own, tmp_path)
    assert same(own, model)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["head.more"] = sorted(places["weight_map"].values())[0]
    index.write_text(json.dumps(places))
    with pytest.raises(ValueError, match="missing: head.more in model-00001-of"):
        read_stored_weights(tmp_path)
    with pytest.raises(ValueError, match="holds no model.safetensors; expected the folder of a saved model"):
        read_stored_weights(tmp_path / "empty")


def test_a_model_that_no_memory_holds_is_refused_before_it_is_built():
    config = VQVAEConfig(vocab_size=1 << 30, embedding_dim=512)
    with pytest.raises(ValueError, match=r"a VQVAE of these options has 2199.* GB of weights \(quantizer.codebook"):
        check_memory(VQVAE, config)
    check_memory(VQVAE, VQVAEConfig())
