"""Block layouts: which cells a block covers, in which order, and what a token may see."""

import json
from itertools import product

import pytest
import torch

from nextblock.data.blocks import BlockLayout, as_shape

TILES = {
    "raster": ((1, 1), (4, 4)),
    "rows": ((1, 6), (4, 6)),
    "columns": ((4, 1), (4, 6)),
    "quadrants": ((2, 2), (4, 4)),
    "patches of a wide grid": ((2, 4), (4, 8)),
    "one tile": ((3, 5), (3, 5)),
}
SCALES = {
    "var": [1, 2, 3, 4],
    "not square": [(1, 1), (2, 3), (4, 8)],
    "one scale": [(2, 3)],
    "equal neighbours": [1, 2, 2],
}
LAYOUTS = {name: BlockLayout.tiles(*arguments) for name, arguments in TILES.items()} | {
    name: BlockLayout.scales(scales) for name, scales in SCALES.items()
}
all_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
tile_layouts = pytest.mark.parametrize("layout", [LAYOUTS[name] for name in TILES], ids=TILES.keys())


def test_known_values_of_scales():
    layout = BlockLayout.scales([1, (2, 3), (4, 4)])
    assert layout.is_scales
    assert layout.grid == (4, 4)
    assert layout.shapes == ((1, 1), (2, 3), (4, 4))
    assert layout.num_blocks == 3
    assert layout.block_lengths == (1, 6, 16)
    assert layout.num_tokens == 23
    assert layout.bounds == ((0, 1), (1, 7), (7, 23))
    assert layout.block_ids().tolist() == [0] + [1] * 6 + [2] * 16


def test_known_values_of_tiles():
    layout = BlockLayout.tiles((1, 2), (2, 4))
    assert not layout.is_scales
    assert layout.grid == (2, 4)
    assert layout.shapes == ((1, 2),) * 4
    assert layout.block_lengths == (2, 2, 2, 2)
    assert layout.bounds == ((0, 2), (2, 4), (4, 6), (6, 8))
    assert layout.block_ids().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_quadrants_read_top_left_top_right_bottom_left_bottom_right():
    layout = BlockLayout.tiles(2, 4)
    assert layout.tile_cells().tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize("name", ["raster", "rows"])
def test_single_cells_and_rows_keep_raster_order(name):
    layout = LAYOUTS[name]
    assert layout.tile_cells().tolist() == list(range(layout.num_tokens))


@tile_layouts
def test_tiles_cover_every_cell_exactly_once(layout):
    visits = torch.zeros(layout.grid, dtype=torch.int64)
    for k in range(layout.num_blocks):
        visits[layout.tile_slices(k)] += 1
    assert torch.equal(visits, torch.ones_like(visits))
    assert sorted(layout.tile_cells().tolist()) == list(range(layout.grid[0] * layout.grid[1]))


@tile_layouts
def test_tile_cells_and_tile_slices_name_the_same_cells_in_the_same_order(layout):
    numbers = torch.arange(layout.grid[0] * layout.grid[1]).view(layout.grid)
    for k, cells in enumerate(layout.tile_cells().split(layout.block_lengths)):
        assert torch.equal(numbers[layout.tile_slices(k)].flatten(), cells)


@all_layouts
def test_split_and_join_are_inverse(layout):
    tokens = torch.arange(2 * layout.num_tokens).view(2, -1)
    idx_Bl = layout.split(tokens)
    assert [tuple(idx.shape) for idx in idx_Bl] == [(2, length) for length in layout.block_lengths]
    assert idx_Bl[-1][1, -1] == tokens[1, -1]
    assert torch.equal(layout.join(idx_Bl), tokens)


def test_split_takes_vectors_too():
    vectors = torch.randn(2, 5, 3)
    first, second = BlockLayout.scales([1, 2]).split(vectors)
    assert torch.equal(first, vectors[:, :1])
    assert torch.equal(second, vectors[:, 1:])


@all_layouts
def test_mask_lets_a_token_see_its_own_block_and_all_before(layout):
    bias = layout.block_causal_bias("cpu", torch.float64)
    assert bias is layout.block_causal_bias("cpu", torch.float64)
    assert bias.dtype == torch.float64
    mask = bias == 0
    assert (bias[~mask] == -torch.inf).all()
    block_of = [k for k, length in enumerate(layout.block_lengths) for _ in range(length)]
    assert mask.shape == (layout.num_tokens, layout.num_tokens)
    for query, key in product(range(layout.num_tokens), repeat=2):
        assert mask[query, key].item() == (block_of[key] <= block_of[query])


@all_layouts
def test_dict_survives_json(layout):
    assert BlockLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_equality_is_by_content_and_ignores_what_was_computed_on_the_way():
    layout = BlockLayout.tiles(2, (4, 4))
    assert layout.num_tokens == len(layout.tile_cells())
    assert layout == BlockLayout.tiles((2, 2), 4)
    assert hash(layout) == hash(BlockLayout.tiles((2, 2), 4))
    assert layout != BlockLayout.tiles(1, 4)
    assert BlockLayout.tiles(4, 4) != BlockLayout.scales([4])


@pytest.mark.parametrize(("value", "shape"), [(3, (3, 3)), ((2, 5), (2, 5)), ([1, 7], (1, 7))])
def test_shape_reads_integers_and_pairs(value, shape):
    assert as_shape(value, "size") == shape


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4", None, (), (3,), (1, 2, 3), (2, 0), (2.0, 2), (True, 2)])
def test_shape_refuses_anything_else_by_name(value):
    with pytest.raises(ValueError, match="image_size is .*expected a positive integer"):
        as_shape(value, "image_size")


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([], r"scales is \[\]"),
        (None, "scales is None"),
        (8, "scales is 8"),
        ([1, 0, 4], r"scales\[1\] is 0"),
        ([1, 4, 2], r"scales\[2\] is \(2, 2\), smaller than scales\[1\] = \(4, 4\)"),
        ([(1, 2), (2, 1)], r"scales\[1\] is \(2, 1\), smaller"),
    ],
)
def test_bad_scales_are_refused(scales, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout.scales(scales)


@pytest.mark.parametrize(
    ("tile", "grid", "message"),
    [
        ((3, 2), (4, 4), r"tile \(3, 2\) does not divide the latent grid \(4, 4\)"),
        ((2, 3), (4, 4), r"tile \(2, 3\) does not divide"),
        (8, 4, r"tile \(8, 8\) does not divide"),
        (0, 4, "tile is 0"),
        (1, (4, -4), r"grid is \(4, -4\)"),
    ],
)
def test_tiles_that_do_not_divide_the_grid_are_refused(tile, grid, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout.tiles(tile, grid)


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        {},
        {"kind": "rings"},
        {"kind": "scales"},
        {"kind": "tiles", "tile": 1},
        {"kind": "scales", "scales": [1], "grid": 1},
    ],
)
def test_dicts_that_describe_no_layout_are_refused(fields):
    with pytest.raises(ValueError, match="layout is "):
        BlockLayout.from_dict(fields)


@pytest.mark.parametrize("tokens", [torch.zeros(5), torch.zeros(2, 4), torch.zeros(2, 6, 3)])
def test_split_refuses_another_length(tokens):
    with pytest.raises(ValueError, match=r"tokens have shape .*expected \(batch, 5, …\)"):
        BlockLayout.scales([1, 2]).split(tokens)


@pytest.mark.parametrize(
    ("idx_Bl", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), "idx_Bl has Tensor; expected a list of 2"),
        ([torch.zeros(2, 1, dtype=torch.int64)], "idx_Bl has 1 blocks; expected a list of 2"),
        ([torch.zeros(2, 1, dtype=torch.int64)] * 3, "idx_Bl has 3 blocks"),
        ([torch.zeros(2, 1, dtype=torch.int64)] * 2, r"idx_Bl\[1\] has shape \(2, 1\); expected \(2, 4\)"),
        (
            [torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)],
            r"idx_Bl\[1\] has shape \(3, 4\); expected \(2, 4\)",
        ),
        (
            [torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int32)],
            r"idx_Bl\[1\] has dtype torch.int32; expected torch.int64",
        ),
        ([torch.zeros(2, 1), torch.zeros(2, 4, dtype=torch.int64)], r"idx_Bl\[0\] has dtype torch.float32"),
    ],
)
def test_join_names_the_block_that_does_not_fit(idx_Bl, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout.scales([1, 2]).join(idx_Bl)
