"""Stop requests in one process: handlers, agreement, lagged reading. With two processes: test_kill.py."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nextblock.data.workers import STOP_SIGNALS
from nextblock.training.stopping import StopRequest, read_later

ALONE = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_handlers_come_back(number):
    before = [signal.getsignal(other) for other in STOP_SIGNALS]
    with StopRequest(ALONE) as stop:
        assert stop.agreed() is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # A launcher passes on what the terminal has sent already.
        assert stop.agreed() is number and stop.agreed() is number
    assert [signal.getsignal(other) for other in STOP_SIGNALS] == before


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(KeyError), StopRequest(ALONE):
        raise KeyError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_outside_the_main_thread_signals_are_left_alone():
    before, agreed = [signal.getsignal(number) for number in STOP_SIGNALS], []

    def train():
        with StopRequest(ALONE) as stop:
            agreed.append((stop.agreed(), [signal.getsignal(number) for number in STOP_SIGNALS]))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert agreed == [(None, before)]


def test_the_highest_signal_of_all_processes_counts(monkeypatch):
    others = iter([0, int(signal.SIGTERM)])

    def all_reduce(tensor, op):
        assert op == dist.ReduceOp.MAX
        tensor.copy_(torch.maximum(tensor, torch.tensor(next(others), dtype=tensor.dtype)))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    stop = StopRequest(SimpleNamespace(device=torch.device("cpu"), num_processes=2))
    assert stop.agreed() is None
    assert stop.agreed() is signal.SIGTERM


def test_a_gpus_answer_is_read_one_step_later(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: None)
    stop = StopRequest(SimpleNamespace(device=torch.device("cpu"), num_processes=2))
    stop._is_lagged = True
    assert stop.agreed() is None
    stop._note(signal.SIGINT, None)
    assert stop.agreed() is None
    assert stop.agreed() is signal.SIGINT


def test_what_is_read_later_is_the_value_of_now():
    value = torch.tensor(3, dtype=torch.int32)
    read = read_later(value)
    value.zero_()
    assert read() == 3
