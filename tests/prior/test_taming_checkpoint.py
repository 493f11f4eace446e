"""taming's transformers: converted, they compute what the reference does; exported, they are back bit for bit."""

import pytest
import torch

from nextblock.convert_prior import main
from nextblock.data.blocks import BlockLayout
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import GPTPrior, GPTPriorConfig, SamplingOptions
from nextblock.prior.sampling import truncate_logits
from nextblock.prior.taming_checkpoint import prior_to_taming, taming_arguments, taming_sampling
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.codebook_learned import LearnedCodebook
from nextblock.tokenizer.codec_tiles import TileCodec
from nextblock.tokenizer.quantizer import Quantizer

from ..parity import load_case, needs_whole

TOLERANCE = 2e-4
CASES = ("taming-cin", "taming-uncond")


def convert(checkpoint, output_dir, *options):
    main(["--checkpoint", str(checkpoint), "--output_dir", str(output_dir), *map(str, options)])


@pytest.fixture(scope="module", params=CASES)
def converted(request, tmp_path_factory):
    """A parity case, and the folder that the command line made of its file."""
    case, folder = load_case(request.param, is_whole=True), tmp_path_factory.mktemp(request.param)
    torch.save(case.content("gpt"), folder / "prior.ckpt")
    facts = case.facts["gpt"]
    options = ["--num_heads", facts["n_head"], "--num_classes", facts["num_classes"]]
    convert(folder / "prior.ckpt", folder / "prior", *options)
    return case, folder / "prior"


def labels_of(case) -> torch.Tensor:
    return case.tensors["labels"] if case.facts["gpt"]["num_classes"] else torch.zeros(2, dtype=torch.int64)


@needs_whole
@torch.no_grad()
def test_teacher_forcing_matches_the_reference(converted):
    case, folder = converted
    model, idx, sampling = GPTPrior.from_pretrained(folder), case.tensors["idx"], case.facts["sampling"]
    output = model(idx[:, :-1], labels_of(case), idx)
    assert case.error(output.logits, "logits") < TOLERANCE
    assert case.error(output.loss, "ce_loss") < TOLERANCE
    options = SamplingOptions(top_k=sampling["top_k"], top_p=sampling["top_p"])
    assert torch.equal(truncate_logits(output.logits, options).isfinite(), case.tensors["kept"].bool())


@needs_whole
def test_greedy_sampling_matches_the_reference(converted):
    case, folder = converted
    model = GPTPrior.from_pretrained(folder)
    quantizer = Quantizer(TileCodec(model.layout), LearnedCodebook(model.vocab_size, 4, init_scale=1.0)).eval()
    idx_Bl = model.generate(labels_of(case), quantizer, top_k=1)
    assert torch.equal(torch.cat(idx_Bl, 1), case.tensors["greedy_idx"])
    with pytest.raises(ValueError, match="guidance_scale is 2.0; expected 1 for a model"):
        model.generate(labels_of(case), quantizer, guidance_scale=2.0)


@needs_whole
def test_export_gives_back_every_bit(converted, tmp_path):
    case, folder = converted
    main(["--format", "taming", "--export", "--checkpoint", str(folder), "--output_dir", str(tmp_path)])
    facts = case.facts["gpt"]
    path = tmp_path / f"taming_{facts['n_layer']}x{facts['n_embd']}.ckpt"
    state, drawn = torch.load(path, weights_only=True)["state_dict"], case.state_dict("gpt", "gpt.")
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        f"transformer.{name}": shape for name, shape in facts["shapes"].items()
    }
    assert all(torch.equal(state[f"transformer.{name}"], tensor) for name, tensor in drawn.items())
    arguments = taming_arguments(GPTPriorConfig.from_pretrained(folder))
    assert arguments == {key: facts[key] for key in arguments} and len(arguments) == 5


def small_state(**options) -> dict[str, torch.Tensor]:
    """A tiny transformer's tensors, with positions for one cell more than the grid has."""
    torch.manual_seed(0)
    sizes = {"layout": BlockLayout.tiles(1, [2, 3]).to_dict(), "vocab_size": 11, "hidden_size": 64, "num_layers": 2}
    return prior_to_taming(GPTPrior(GPTPriorConfig(**sizes | {"num_heads": 1, "num_positions": 7} | options)))


@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_longer_table_s_first_rows_count_and_a_pipeline_has_the_published_sampling(num_classes, tmp_path):
    state = small_state()
    torch.save({"state_dict": state | {"first_stage_model.x": torch.zeros(1)}, "epoch": 2}, tmp_path / "prior.ckpt")
    sizes = {"image_size": [8, 12], "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 11, "codebook_init_scale": 1.0}
    VQVAE(VQVAEConfig(layout="tiles", tile=1, **sizes)).save_pretrained(tmp_path / "tokenizer")
    options = ["--to_pipeline", "--tokenizer", tmp_path / "tokenizer", "--num_classes", num_classes]
    options += [] if num_classes else ["--start_token", 4]
    convert(tmp_path / "prior.ckpt", tmp_path / "pipeline", *options)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    prior = pipe.prior
    assert prior.layout.grid == (2, 3) and prior.config.num_positions == 7 and prior.config.num_classes == num_classes
    assert pipe.sampling == SamplingOptions(top_k=11, top_p=0.92 if num_classes else 1.0)
    label = torch.tensor([2 if num_classes else 0])
    first = 2 if num_classes else 4
    expected = state["transformer.tok_emb.weight"][first]
    assert torch.equal(prior.context(prior.conditions.of(label)).prefix[0, 0], expected)
    assert len(pipe([2] if num_classes else 1, output_type="pt").images) == 1


def test_published_sampling():
    published = {n: taming_sampling(GPTPriorConfig(vocab_size=1024, num_classes=n)) for n in (0, 1000)}
    assert published == {0: SamplingOptions(top_k=250), 1000: SamplingOptions(top_k=600, top_p=0.92)}


def changed(**tensors) -> dict[str, torch.Tensor]:
    """The small state with tensors in place of others, None for none."""
    state = small_state() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


PLAIN = ["--num_classes", "0", "--grid", "[2,3]"]


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({}, ["--num_classes", "0"], "grid is missing; expected the rows and columns of tokens, at most 7 cells"),
        ({}, ["--grid", "[2,3]"], "num_classes is missing; expected the number of classes"),
        ({}, ["--num_classes", "12", "--grid", "[2,3]"], "num_classes is 12; expected at most vocab_size, 11"),
        ({}, ["--num_classes", "-1", "--grid", "[2,3]"], "num_classes is -1; expected an integer from 0"),
        ({}, [*PLAIN, "--start_token", "11"], "start_token is 11; expected an integer from 0 to 10"),
        ({}, ["--num_classes", "3", "--grid", "[2,3]", "--start_token", "1"], "start_token is 1; expected 0 with 3 cl"),
        ({}, [*PLAIN, "--num_heads", "3"], "num_heads is 3; expected a divisor of hidden_size 64"),
        ({}, ["--num_classes", "0", "--grid", "[2,4]"], "num_positions is 7; expected an integer from 8"),
        ({"transformer__ln_f__bias": None}, PLAIN, r"missing: ln_f.bias \(64,\)"),
        ({"loss__x": torch.ones(1)}, PLAIN, r"unexpected: loss.x \(1,\)"),
        ({"tok_emb__weight": torch.ones(11, 64)}, PLAIN, r"holds \['tok_emb.weight'\] under .* and beside it"),
        ({"cond_stage_model__x": torch.ones(1)}, PLAIN, "cond_stage_model.x: conditioned on pictures"),
        ({"permuter__forward_shuffle_idx": torch.tensor([1, 0])}, PLAIN, "permutes the tokens; expected raster order"),
        ({"transformer__blocks__1__attn__mask": torch.ones(1, 1, 7, 7)}, PLAIN, "are not causal"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tensors, options, message, tmp_path):
    torch.save({"state_dict": changed(**tensors)}, tmp_path / "prior.ckpt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "prior.ckpt", tmp_path / "out", *options)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_file_of_the_transformer_alone_and_an_order_that_is_raster_are_taken(tmp_path):
    bare = {name.removeprefix("transformer."): tensor for name, tensor in small_state().items()}
    bare = {name: tensor for name, tensor in bare.items() if not name.endswith(".mask")}
    torch.save(bare | {"permuter.forward_shuffle_idx": torch.arange(6)}, tmp_path / "prior.ckpt")
    convert(tmp_path / "prior.ckpt", tmp_path / "out", *PLAIN)
    prior = GPTPrior.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, bare[name]) for name, tensor in prior.state_dict().items())


def test_export_refuses_what_the_format_cannot_say():
    with pytest.raises(ValueError, match="inner_size is 8; expected 4 times hidden_size"):
        small_state(inner_size=8)
