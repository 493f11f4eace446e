"""Callbacks after each block: what they see, what they change, how they stop; progress bars."""

import pytest
import torch
from diffusers.callbacks import PipelineCallback

NAMES = ["idx", "logits"]


def joined(blocks) -> torch.Tensor:
    return torch.cat(list(blocks), dim=1)


def latent(pipe, *args, **options) -> torch.Tensor:
    return joined(pipe(*args, output_type="latent", **options).images)


def test_a_callback_sees_every_block_and_changes_nothing_by_itself(any_pipe, seeds):
    pipe, seen = any_pipe, []

    def look(owner, step, block, tensors):
        assert owner.prior is pipe.prior and type(owner) is type(pipe) and step == block and set(tensors) == set(NAMES)
        seen.append((step, {name: tensor.clone() for name, tensor in tensors.items()}))
        return tensors

    for options in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_schedule": "linear"}):
        seen.clear()
        plain = latent(pipe, [0, 1, 2], 2, generator=seeds(6), **options)
        watched = latent(
            pipe,
            [0, 1, 2],
            2,
            generator=seeds(6),
            callback_on_step_end=look,
            callback_on_step_end_tensor_inputs=NAMES,
            batch_size=4,
            **options,
        )
        assert torch.equal(watched, plain)
        K = pipe.num_timesteps
        assert [step for step, _ in seen] == [*range(K)] * 2
        rows = [joined(tensors["idx"] for _, tensors in seen[part * K : (part + 1) * K]) for part in range(2)]
        assert [len(part) for part in rows] == [4, 2] and torch.equal(torch.cat(rows), plain)
        assert all(tensors["logits"].shape == (*tensors["idx"].shape, 12) for _, tensors in seen)


def test_a_guidance_scale_set_on_the_way_holds_for_the_blocks_after_it(any_pipe, seeds):
    pipe = any_pipe

    def run(scale, set_to=None, after=0, **options):
        logits = []

        def set_scale(pipe, step, block, tensors):
            logits.append(tensors["logits"].clone())
            if set_to is not None and step == after:
                pipe._guidance_scale = set_to
            return {}

        names = {"callback_on_step_end": set_scale, "callback_on_step_end_tensor_inputs": ["logits"]}
        # The tokens are known, so that only guidance can tell the runs apart.
        pipe([0, 1], generator=seeds(2), guidance_scale=scale, idx_Bl=known, **names, **options)
        return logits

    known = pipe([0, 1], generator=seeds(2), output_type="latent").images
    none, full = run(1.0), run(3.0)
    dropped, raised = run(3.0, 1.0), run(1.0, 3.0, after=1)
    for k in range(pipe.num_timesteps):
        torch.testing.assert_close(dropped[k], full[k] if k < 1 else none[k], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(raised[k], none[k] if k < 2 else full[k], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(none[k], full[k], rtol=1e-2)
    linear = run(2.0, 3.0, guidance_schedule="linear")
    expected = run(3.0, guidance_schedule="linear")
    torch.testing.assert_close(linear[-1], expected[-1], rtol=1e-4, atol=1e-4)


def test_every_batch_begins_with_the_scale_of_the_call(build_pipeline, seeds):
    pipe = build_pipeline()

    def lower(pipe, step, block, tensors):
        pipe._guidance_scale = 1.0
        return tensors

    options = {"guidance_scale": 4.0, "callback_on_step_end": lower}
    together = latent(pipe, [0, 1, 2], generator=seeds(3), **options)
    assert torch.equal(latent(pipe, [0, 1, 2], generator=seeds(3), batch_size=1, **options), together)
    assert not torch.equal(latent(pipe, [0, 1, 2], generator=seeds(3), guidance_scale=4.0), together)


def test_returned_tensors_replace_those_of_the_block(any_pipe, seeds):
    pipe = any_pipe

    def run(change, names=NAMES):
        options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
        return pipe([0, 1], generator=seeds(2), output_type="latent", **options).images

    plain = pipe([0, 1], generator=seeds(2), output_type="latent").images
    given = [torch.full_like(idx, 7 if k == 1 else -1) for k, idx in enumerate(plain)]
    expected = joined(pipe([0, 1], generator=seeds(2), idx_Bl=given, output_type="latent").images)

    def set_tokens(pipe, step, block, tensors):
        return {"idx": torch.full_like(tensors["idx"], 7)} if step == 1 else {}

    def set_in_place(pipe, step, block, tensors):
        tensors["idx"].fill_(7) if step == 1 else None
        return tensors

    def forbid_all_but_seven(pipe, step, block, tensors):
        logits = tensors["logits"].clone()
        if step == 1:
            logits[..., [v for v in range(12) if v != 7]] = -torch.inf
        return {"logits": logits}

    for change in (set_tokens, set_in_place, forbid_all_but_seven):
        assert torch.equal(joined(run(change)), expected)
    assert not torch.equal(joined(plain), expected)
    shifted = run(lambda pipe, step, block, tensors: {"logits": tensors["logits"] + 1}, ["logits"])
    assert torch.equal(joined(shifted), joined(plain))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "callback_on_step_end returned None; expected a dict whose keys are among"),
        ({"latents": 1}, r"callback_on_step_end returned \{'latents': 1\}; expected a dict whose keys"),
        ({"idx": 3}, "returned idx of 3; expected torch.int64"),
        ({"idx": torch.zeros(1, 2, dtype=torch.int64)}, r"returned idx of torch.int64 \(1, 2\); expected"),
        ({"idx": torch.tensor([[12]])}, "returned idx from 12 to 12; expected 0 to 11"),
        ({"logits": torch.full((1, 1, 12), torch.nan)}, "returned logits that are no distribution"),
        ({"logits": torch.full((1, 1, 12), -torch.inf)}, "returned logits that are no distribution"),
    ],
)
def test_what_cannot_replace_a_block_is_refused(returned, message, build_pipeline):
    options = {"callback_on_step_end": lambda *args: returned, "callback_on_step_end_tensor_inputs": NAMES}
    with pytest.raises(ValueError, match=message):
        build_pipeline()(0, **options)


def test_a_guidance_scale_that_is_none_is_refused(build_pipeline):
    def set_scale(pipe, step, block, tensors):
        pipe._guidance_scale = 2.0 if pipe.prior.config.num_classes == 0 else float("nan")
        return tensors

    with pytest.raises(ValueError, match="guidance_scale is nan; expected a number from 0 to 1000"):
        build_pipeline()(0, callback_on_step_end=set_scale)
    with pytest.raises(ValueError, match="guidance_scale is 2.0; expected 1 for a model without classes"):
        build_pipeline(num_classes=0)(callback_on_step_end=set_scale)


def test_an_interrupted_call_says_what_it_left_out_and_can_be_gone_on_from(any_pipe, seeds):
    pipe = any_pipe

    def stop(pipe, step, block, tensors):
        pipe._interrupt = step == 1
        return tensors

    whole = pipe([0, 1, 2], generator=seeds(3), output_type="latent").images
    part = pipe([0, 1, 2], generator=seeds(3), output_type="latent", callback_on_step_end=stop, batch_size=2).images
    for k, (idx, expected) in enumerate(zip(part, whole, strict=True)):
        assert torch.equal(idx[:2], expected[:2] if k < 2 else torch.full_like(idx[:2], -1))
        assert (idx[2] == -1).all()
    again = pipe([0, 1, 2], generator=seeds(3), idx_Bl=part, output_type="latent").images
    assert torch.equal(joined(again), joined(whole))
    stopped = pipe([0, 1, 2], generator=seeds(3), output_type="pt", callback_on_step_end=stop).images
    so_far = pipe.progressive([0, 1, 2], generator=seeds(3), output_type="pt")[1]
    assert torch.equal(stopped, so_far)


class Cutoff(PipelineCallback):
    """A callback as diffusers' own are: it knows its tensors, and when to act."""

    tensor_inputs = ["logits"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert set(callback_kwargs) == {"logits"}
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._guidance_scale = 1.0
        return callback_kwargs


def test_callback_classes_of_diffusers_bring_their_own_tensors(build_pipeline, seeds):
    pipe = build_pipeline()

    def lower(pipe, step, block, tensors):
        pipe._guidance_scale = 4.0 if step < 1 else 1.0
        return tensors

    options = {"generator": seeds(3), "guidance_scale": 4.0}
    cut = latent(pipe, [0, 1, 2], callback_on_step_end=Cutoff(cutoff_step_ratio=0.5), **options)
    assert torch.equal(cut, latent(pipe, [0, 1, 2], callback_on_step_end=lower, **options | {"generator": seeds(3)}))


def test_the_progress_bar_counts_blocks_and_takes_its_configuration(build_pipeline, capsys):
    pipe = build_pipeline()
    pipe([0, 1, 2], batch_size=2)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="painting", ncols=60)
    pipe([0, 1, 2], batch_size=2)
    shown = capsys.readouterr().err
    assert "painting" in shown and "6/6" in shown and max(map(len, shown.split("\r"))) <= 61
