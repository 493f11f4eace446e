"""Configurations of priors: what is out of range, or more than any prior has, is refused before memory is taken."""

import pytest

from nextblock.prior import BlockPriorConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 10**6}, "num_layers is 1000000; expected an integer from 1 to 1024"),
        ({"num_layers": 2.0}, "num_layers is 2.0"),
        ({"num_heads": True}, "num_heads is True"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"hidden_size": -128}, "hidden_size is -128; expected an integer from 1 to 131072"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; expected an integer from 2 to 4294967296"),
        ({"num_classes": 10**9}, "num_classes is 1000000000"),
        ({"num_layers": 1024, "hidden_size": 1 << 17}, "num_layers 1024, hidden_size 131072, .* make a model of about"),
        ({"mlp_ratio": 1e12}, "mlp_ratio 1000000000000.0, .* make a model of about"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan; expected a finite number above 0"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio is inf"),
        ({"norm_eps": "1e-6"}, "norm_eps is '1e-6'"),
        ({"attention_scale": 0}, "attention_scale is 0"),
        ({"dropout": 1}, r"dropout is 1; expected a number in \[0, 1\)"),
        ({"drop_path": -0.5}, "drop_path is -0.5"),
        ({"label_smoothing": True}, "label_smoothing is True"),
        ({"adaln_gamma_init": float("inf")}, "adaln_gamma_init is inf; expected a finite number"),
        ({"use_shared_adaln": "yes"}, "use_shared_adaln is 'yes'; expected true or false"),
        ({"num_classes": 2, "class_names": [1, 2]}, r"class_names is \[1, 2\]; expected texts"),
        ({"num_classes": 2, "class_names": "ab"}, "class_names is 'ab'; expected texts"),
        ({"layout": {"kind": "tiles", "tile": 1, "grid": 10**6}}, "1000000000000 tokens; expected at most 1048576"),
        ({"layout": {"kind": "scales", "scales": [1] * 10**6}}, "scales has 1000000 sizes; expected at most 1024"),
        ({"layout": "scales"}, "layout is 'scales'"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        BlockPriorConfig(**options)
