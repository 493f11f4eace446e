"""A prior knows the tokenizer whose tokens it has learned: another one is warned of, or refused on request."""

import logging
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from nextblock.__main__ import main
from nextblock.files.fingerprints import model_fingerprint
from nextblock.pipelines import ClassToImagePipeline
from nextblock.tokenizer import VQVAE

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def pipe(build_pipeline) -> ClassToImagePipeline:
    pipe = build_pipeline()
    pipe.prior.config.tokenizer_fingerprint = model_fingerprint(pipe.tokenizer)
    return pipe


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def foreign(pipe, folder, tmp_path):
    """The pipeline's folder with a tokenizer in which one weight of the decoder is another."""
    other = shutil.copytree(folder, tmp_path / "foreign")
    tokenizer = VQVAE(pipe.tokenizer.config)
    tokenizer.load_state_dict(pipe.tokenizer.state_dict())
    with torch.no_grad():
        next(tokenizer.decoder.parameters()).flatten()[0] += 0.5
    tokenizer.save_pretrained(other / "tokenizer")
    return other


def loads() -> list:
    """Ways to load a pipeline, with the dtypes in which each can tell."""
    ways = [(ClassToImagePipeline, dtype) for dtype in (None, torch.float32, *HALF)]
    return [*ways, (DiffusionPipeline, None)]


@pytest.mark.parametrize(("pipeline_class", "dtype"), [*loads(), *((DiffusionPipeline, dtype) for dtype in HALF)])
def test_the_own_tokenizer_is_no_matter_in_any_precision(folder, caplog, pipeline_class, dtype):
    options = {} if dtype is None else {"dtype": dtype}
    pipe = pipeline_class.from_pretrained(folder, requires_own_tokenizer=True, **options)
    # What half precision has rounded is not taken for another one when it is saved, whatever it is loaded in.
    pipe.save_pretrained(folder.parent / "again")
    for again in (None, torch.float32, *HALF):
        ClassToImagePipeline.from_pretrained(folder.parent / "again", requires_own_tokenizer=True, dtype=again)
    pipe.to(torch.float32)
    ClassToImagePipeline(tokenizer=pipe.tokenizer, prior=pipe.prior, requires_own_tokenizer=True)
    assert "fingerprint" not in caplog.text


@pytest.mark.parametrize(("pipeline_class", "dtype"), loads())
def test_another_tokenizer_is_named_or_refused(foreign, pipe, caplog, pipeline_class, dtype):
    own, other = model_fingerprint(pipe.tokenizer), model_fingerprint(VQVAE.from_pretrained(foreign / "tokenizer"))
    options = {} if dtype is None else {"dtype": dtype}
    with caplog.at_level(logging.WARNING):
        loaded = pipeline_class.from_pretrained(foreign, **options)
    (record,) = (record for record in caplog.records if "fingerprint" in record.getMessage())
    assert f"has the fingerprint {other}; expected {own}, of the tokenizer whose tokens" in record.getMessage()
    assert len(loaded("wren").images) == 1
    with pytest.raises(ValueError, match=f"requires_own_tokenizer is true: .*{other}; expected {own}"):
        pipeline_class.from_pretrained(foreign, requires_own_tokenizer=True, **options)


def test_a_tokenizer_that_is_given_is_compared_itself(foreign, folder, pipe, caplog):
    given = VQVAE.from_pretrained(folder / "tokenizer")
    ClassToImagePipeline.from_pretrained(foreign, tokenizer=given, requires_own_tokenizer=True)
    with pytest.raises(ValueError, match="requires_own_tokenizer is true"):
        ClassToImagePipeline.from_pretrained(
            folder, tokenizer=VQVAE.from_pretrained(foreign / "tokenizer"), requires_own_tokenizer=True
        )
    assert "requires_own_tokenizer" not in (folder / "model_index.json").read_text()


def test_a_prior_that_knows_no_tokenizer_is_taken_unless_it_must_have_its_own(build_pipeline, foreign, caplog):
    prior = build_pipeline().prior
    assert prior.config.tokenizer_fingerprint is None
    tokenizer = VQVAE.from_pretrained(foreign / "tokenizer")
    ClassToImagePipeline(tokenizer=tokenizer, prior=prior)
    assert "fingerprint" not in caplog.text
    with pytest.raises(ValueError, match="the prior's tokenizer_fingerprint is None"):
        ClassToImagePipeline(tokenizer=tokenizer, prior=prior, requires_own_tokenizer=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda pipe: (pipe.prior, pipe.tokenizer), "tokenizer is a BlockPrior without quantizer, .* a VQVAE"),
        (lambda pipe: (pipe.tokenizer, pipe.tokenizer), "prior is a VQVAE without vocab_size, .* a BlockPrior"),
        (lambda pipe: (None, pipe.prior), "tokenizer is None without quantizer, .*; expected a VQVAE"),
        (lambda pipe: (pipe.tokenizer, None), "prior is None without layout, .*; expected a BlockPrior"),
        (lambda pipe: ("folder", pipe.prior), "tokenizer is a str without quantizer"),
        (lambda pipe: (VQVAE, pipe.prior), "tokenizer is the class VQVAE; expected a VQVAE"),
        (lambda pipe: (pipe.tokenizer.quantizer, pipe.prior), "tokenizer is a Quantizer without quantizer"),
        (lambda pipe: (pipe.tokenizer, torch.nn.Identity()), "prior is a Identity without layout"),
        (lambda pipe: (pipe.tokenizer, pipe.prior, None, "card"), "card is 'card'; expected a dict, or None"),
        (lambda pipe: (pipe.tokenizer, pipe.prior, None, None, 1), "requires_own_tokenizer is 1; expected True"),
    ],
)
def test_components_that_are_none_are_refused_by_name(changes, message, pipe):
    with pytest.raises(ValueError, match=message):
        ClassToImagePipeline(*changes(pipe))


def test_commands_refuse_on_request(foreign, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        options = ["--pipeline", str(foreign), "--output_dir", str(tmp_path / "out"), "--cpu", "true"]
        main(["sample", *options, "--requires_own_tokenizer", "true"])
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert "nextblock sample: error: pipeline is" in message and "requires_own_tokenizer is true" in message


def test_what_a_prior_knows_of_its_tokenizer_is_no_part_of_its_own_fingerprint(pipe):
    before = model_fingerprint(pipe.prior)
    pipe.prior.config.tokenizer_fingerprint = None
    assert model_fingerprint(pipe.prior) == before
