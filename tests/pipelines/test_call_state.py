"""State of a call: threads that sample with one pipeline at once, calls within calls."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def joined(blocks) -> torch.Tensor:
    return torch.cat(list(blocks), dim=1)


def sample_in_step(pipe, barrier, seeds, scale: float, lowers: bool):
    """Sample, and meet other calls at every block before and after a scale is set; return tokens and scales seen."""
    seen = []

    def callback(pipe, step, block, tensors):
        barrier.wait()
        seen.append(pipe.guidance_scale)
        if lowers:
            pipe._guidance_scale = 1.5
        barrier.wait()
        assert pipe.guidance_scale == (1.5 if lowers else scale)
        return tensors

    options = {"generator": seeds(2), "guidance_scale": scale, "output_type": "latent"}
    return joined(pipe([0, 1], callback_on_step_end=callback, **options).images), seen


def test_threads_do_not_see_each_others_guidance(any_pipe, seeds):
    calls = {"scale": [1.0, 4.0], "lowers": [False, True]}
    alone = [sample_in_step(any_pipe, threading.Barrier(1), seeds, *call) for call in zip(*calls.values(), strict=True)]
    meeting = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda *call: sample_in_step(any_pipe, meeting, seeds, *call), *calls.values()))
    for (tokens, seen), (expected_tokens, expected_seen) in zip(got, alone, strict=True):
        assert seen == expected_seen and torch.equal(tokens, expected_tokens)
    K = any_pipe.num_timesteps
    assert got[0][1] == [1.0] * K and got[1][1] == [4.0] + [1.5] * (K - 1)
    assert not torch.equal(got[0][0], got[1][0])


def test_an_interruption_stops_one_call_and_not_the_other(any_pipe, seeds):
    pipe, started, stopped = any_pipe, threading.Event(), threading.Event()

    def stop(pipe, step, block, tensors):
        started.wait(60)
        pipe._interrupt = True
        return tensors

    def go_on(pipe, step, block, tensors):
        started.set()
        assert stopped.wait(60) and not pipe.interrupt
        return tensors

    def sample(callback):
        images = pipe([0], generator=seeds(1), output_type="latent", callback_on_step_end=callback).images
        if callback is stop:
            stopped.set()
        return joined(images)

    whole = joined(pipe([0], generator=seeds(1), output_type="latent").images)
    with ThreadPoolExecutor(2) as pool:
        part, other = pool.map(sample, [stop, go_on])
    length = pipe.prior.layout.block_lengths[0]
    assert torch.equal(other, whole)
    assert torch.equal(part[:, :length], whole[:, :length]) and (part[:, length:] == -1).all()


def test_a_call_within_a_callback_has_a_state_of_its_own(build_pipeline, seeds):
    pipe, seen = build_pipeline(), []

    def inner(pipe, step, block, tensors):
        pipe._guidance_scale, pipe._interrupt = 9.0, True
        return tensors

    def outer(pipe, step, block, tensors):
        pipe([1], guidance_scale=3.0, callback_on_step_end=inner)
        seen.append((pipe.guidance_scale, pipe.interrupt))
        return tensors

    plain = joined(pipe([0], generator=seeds(1), guidance_scale=2.0, output_type="latent").images)
    options = {"generator": seeds(1), "guidance_scale": 2.0, "output_type": "latent"}
    assert torch.equal(joined(pipe([0], callback_on_step_end=outer, **options).images), plain)
    assert seen == [(2.0, False)] * pipe.num_timesteps


def test_tasks_of_an_event_loop_are_apart(build_pipeline, seeds):
    pipe = build_pipeline()

    def stop(pipe, step, block, tensors):
        pipe._interrupt = True
        return tensors

    async def sample(**options):
        return joined((await asyncio.to_thread(pipe, [0], generator=seeds(1), output_type="latent", **options)).images)

    async def both():
        return await asyncio.gather(sample(callback_on_step_end=stop), sample())

    part, whole = asyncio.run(both())
    assert (part == -1).any() and not (whole == -1).any()


def test_a_stop_that_comes_between_calls_stops_none(build_pipeline):
    pipe = build_pipeline()
    pipe._interrupt = True
    assert pipe.interrupt
    assert not (joined(pipe([0], output_type="latent").images) == -1).any()
