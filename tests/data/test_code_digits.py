"""Digits of codes against Python's own whole numbers."""

import math

import pytest
import torch

from nextblock.data.code_digits import CodeDigits


def plain_digits(idx: int, bases: tuple[int, ...]) -> list[int]:
    digits = []
    for base in bases:
        idx, digit = divmod(idx, base)
        digits.append(digit)
    return digits


@pytest.mark.parametrize("bases", [(2,), (5,), (2, 2, 2, 2), (8, 5, 5), (3, 2, 4, 2), (64, 4096)])
def test_every_index_becomes_its_digits_and_back(bases):
    code_digits = CodeDigits(bases)
    idx = torch.arange(math.prod(bases))
    assert code_digits.num_codes == len(idx) and code_digits.num_digits == len(bases)
    digits = code_digits.split(idx.view(1, -1))
    assert digits.dtype == torch.int64 and digits.shape == (1, len(idx), len(bases))
    seen = range(0, len(idx), max(1, len(idx) // 300))
    assert [digits[0, n].tolist() for n in seen] == [plain_digits(n, bases) for n in seen]
    assert torch.equal(code_digits.join(digits), idx.view(1, -1))


@pytest.mark.parametrize("bases", [(2,) * 32, (2,) * 18, (16,) * 8, (8, 8, 8, 5, 5, 5)])
def test_large_books(bases):
    code_digits = CodeDigits(bases)
    idx = torch.randint(code_digits.num_codes, (50,), generator=torch.Generator().manual_seed(0))
    idx[:2] = torch.tensor([0, code_digits.num_codes - 1])
    digits = code_digits.split(idx)
    assert digits.tolist() == [plain_digits(n, bases) for n in idx.tolist()]
    assert torch.equal(code_digits.join(digits), idx)


def test_neighbouring_digits_make_one():
    code_digits = CodeDigits((2, 3, 4, 5))
    grouped = code_digits.grouped((1, 2, 1))
    assert grouped.bases == (2, 12, 5)
    idx = torch.arange(120)
    digits, together = code_digits.split(idx), grouped.split(idx)
    assert torch.equal(together[:, 1], digits[:, 1] + 3 * digits[:, 2])
    assert torch.equal(grouped.join(together), idx)
    for sizes in ((1, 2), (1, 2, 2), (4, 0), (2, 2.0), ()):
        with pytest.raises(ValueError, match=r"expected counts of digits that add up to 4"):
            code_digits.grouped(sizes)


@pytest.mark.parametrize("bases", [(), (1, 2), (2, -2), (2.0,), (True, 2), ("2",)])
def test_bases_that_are_none_are_refused(bases):
    with pytest.raises(ValueError, match="expected one or more whole numbers of at least 2"):
        CodeDigits(bases)


def test_more_codes_than_shards_can_hold_are_refused():
    with pytest.raises(ValueError, match="8589934592 codes; expected at most 4294967296"):
        CodeDigits((2,) * 33)


def test_lists_are_taken_and_digits_of_an_inference_are_no_trap():
    code_digits = CodeDigits([7, 3])
    with torch.inference_mode():
        assert code_digits.split(torch.tensor([20])).tolist() == [[6, 2]]
    table = torch.ones(3, requires_grad=True)
    (table * code_digits.join(code_digits.split(torch.arange(3)))).sum().backward()
    assert table.grad.tolist() == [0, 1, 2]


def test_bases_of_joined_digits_tell_how_many_each_is_made_of():
    bits = CodeDigits((2,) * 18)
    assert bits.sizes_of([64, 4096]) == (6, 12) and bits.grouped(bits.sizes_of([64, 4096])) == CodeDigits((64, 4096))
    assert CodeDigits((8, 5, 5, 5)).sizes_of((8, 25, 5)) == (1, 2, 1)
    idx = torch.randint(1 << 18, (100,), generator=torch.Generator().manual_seed(0))
    low, high = CodeDigits((64, 4096)).split(idx).unbind(-1)
    digits = bits.split(idx)
    assert torch.equal(low, CodeDigits((2,) * 6).join(digits[:, :6]))
    assert torch.equal(high, CodeDigits((2,) * 12).join(digits[:, 6:]))


@pytest.mark.parametrize("bases", [(5, 8, 25), (40,), (8, 5, 5, 5, 2), (1000, 2), (200, 4)])
def test_digits_are_joined_with_their_neighbours_alone(bases):
    with pytest.raises(ValueError, match=r"expected products of neighbours among \[8, 5, 5, 5\], 1000 codes in all"):
        CodeDigits((8, 5, 5, 5)).sizes_of(bases)


@pytest.mark.parametrize(
    ("bases", "sizes"),
    [((2,) * 18, (9, 9)), ((2,) * 10, (9, 1)), ((8, 5, 5, 5), (3, 1)), ((600, 2, 600), (1, 1, 1)), ((2,), (1,))],
)
def test_digits_are_joined_up_to_a_number_of_values(bases, sizes):
    assert CodeDigits(bases).sizes_within(512) == sizes
