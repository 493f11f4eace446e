import json

import pytest

from nextblock.evaluation.training_log import last_value, loss_curves, read_log, series


def _write(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_series_of_a_resumed_run_takes_the_later_record(tmp_path):
    _write(
        tmp_path,
        {"step": 10, "train/loss": 3.0},
        {"step": 20, "train/loss": 9.0},
        {"step": 20, "eval/psnr": 20.0},
        {"step": 20, "train/loss": 2.0, "eval/loss": 2.5},
        {"step": 30, "train/loss": 1.0, "time/total": 12.5},
    )
    log = read_log(tmp_path)
    assert series(log, "train/loss") == ([10, 20, 30], [3.0, 2.0, 1.0])
    assert loss_curves(log) == {"train/loss": ([10, 20, 30], [3.0, 2.0, 1.0]), "eval/loss": ([20], [2.5])}
    assert last_value(log, "time/total") == 12.5
    assert last_value(log, "eval/accuracy") is None


def test_read_log_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"metrics.jsonl does not exist"):
        read_log(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "trai')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_log(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 1 is .* expected an object with a step"):
        read_log(tmp_path)
