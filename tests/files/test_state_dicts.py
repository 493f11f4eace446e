"""Checkpoints of others: what their tensors claim is there, and what is no file is not waited for."""

import json
import os

import pytest
import torch

from nextblock.files.state_dicts import count_numbered, read_state_dict


@pytest.mark.parametrize("is_zipped", [True, False])
def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(is_zipped, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, path, _use_new_zipfile_serialization=is_zipped)
    with pytest.raises(ValueError, match=r"a claims to be \(1099511627776,\), of which 4 bytes are there"):
        read_state_dict(path)
    torch.save({"a": torch.arange(6.0).view(2, 3).T}, path, _use_new_zipfile_serialization=is_zipped)
    assert read_state_dict(path)["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}},
        None,
    ],
    ids=["offsets", "shape", "overflow", "length"],
)
def test_a_header_of_safetensors_that_claims_terabytes_is_refused(header, tmp_path):
    text = json.dumps(header).encode()
    length = 1 << 62 if header is None else len(text)
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match="x.safetensors' cannot be read"):
        read_state_dict(tmp_path / "x.safetensors")


def test_a_pipe_called_like_a_checkpoint_is_not_waited_for(tmp_path):
    for name in ("x.pth", "x.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"checkpoint is .*{name}'; expected a .pth, .pt or .safetensors file"):
            read_state_dict(tmp_path / name)


def test_one_high_number_makes_no_model_of_that_size():
    state = {"layers.0.weight": torch.zeros(1), "layers.99999999.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"2 tensors, layers.99999999.weight among them; expected numbers after 'lay"):
        count_numbered(state, "layers.")
    assert count_numbered({"layers.1.weight": torch.zeros(1), "x": torch.zeros(1)}, "layers.") == 2
