"""The tokenizer's configuration: what survives a round trip, what it derives, what it refuses and in which words."""

import pytest

from nextblock.data.blocks import BlockLayout
from nextblock.tokenizer import VQVAEConfig

VQGAN = {"autoencoder": "vqgan", "num_res_blocks": 1}
MAGVIT2 = {"autoencoder": "magvit2", "num_res_blocks": 1}
LFQ = {"codebook": "lfq", "embedding_dim": 4}
INDEX = {"codebook_gradient": "index"}


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 16, "codebook": "fsq", "fsq_levels": (4, 4), "embedding_dim": 2, "codebook_digits": (16,)},
        {"image_size": (16, 24), "tile": (2, 3)},
        {"image_size": (16, 24), "layout": "scales", "scales": (1, (2, 3), [4, 6])},
        {"image_size": 32, "autoencoder": "vqgan", "width_multipliers": (1, 2, 2), "num_res_blocks": 1, "tile": 4},
        {"image_size": 32, "autoencoder": "vqgan", "num_res_blocks": 1, "attention_levels": (3, 4)},
    ],
)
def test_tuples_survive_the_round_trip(options, tmp_path):
    config = VQVAEConfig(**options)
    config.save_pretrained(tmp_path)
    loaded = VQVAEConfig.from_pretrained(tmp_path)
    lists = ("image_size", "tile", "scales", "width_multipliers", "fsq_levels", "codebook_digits", "attention_levels")
    for field in lists:
        assert getattr(loaded, field) == getattr(config, field), field
    assert loaded.block_layout() == config.block_layout()
    ignored = {"transformers_version", "_name_or_path"}
    before, after = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, loaded))
    assert before == after


def test_the_layout_follows_from_image_size_and_downsampling():
    assert VQVAEConfig(image_size=32, tile=4).block_layout() == BlockLayout.tiles(4, 8)
    scales = [1, 2, (4, 8)]
    config = VQVAEConfig(image_size=(16, 32), layout="scales", scales=scales)
    assert config.block_layout() == BlockLayout.scales(scales)
    vqgan = VQVAEConfig(image_size=64, autoencoder="vqgan", num_res_blocks=1)
    assert vqgan.downsampling == 16
    assert vqgan.block_layout() == BlockLayout.tiles(1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, r"image_size is \[30, 30\]; expected sides divisible by 4"),
        ({"image_size": (32, 34)}, r"image_size is \[32, 34\]; expected sides divisible by 4"),
        ({"image_size": 40, "autoencoder": "vqgan", "num_res_blocks": 1}, "image_size .* divisible by 16"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": (32, 32, 3)}, "image_size is "),
        ({"image_size": 32.0}, "image_size is 32.0"),
        ({"tile": 3}, r"tile \(3, 3\) does not divide the latent grid \(8, 8\)"),
        ({"tile": (1, 16)}, r"tile \(1, 16\) does not divide"),
        ({"tile": "row"}, "tile is 'row'"),
        ({"layout": "rings"}, "layout is 'rings'; expected one of"),
        ({"layout": "scales"}, "scales is None"),
        ({"layout": "scales", "scales": 8}, "scales is 8"),
        ({"layout": "scales", "scales": []}, r"scales is \[\]"),
        ({"layout": "scales", "scales": [1, 2, 4]}, r"scales ends with \(4, 4\); expected the latent grid \(8, 8\)"),
        ({"layout": "scales", "scales": [1, 16]}, r"scales ends with \(16, 16\)"),
        ({"layout": "scales", "scales": [4, 2, 8]}, r"scales\[1\] is \(2, 2\), smaller"),
        ({"layout": "scales", "scales": [1, 2.5, 8]}, r"scales\[1\] is 2.5"),
        ({"autoencoder": "vit"}, "autoencoder is 'vit'"),
        ({"codebook_update": "sgd"}, "codebook_update is 'sgd'"),
        ({"codebook_init": "normal"}, "codebook_init is 'normal'"),
        ({"quant_conv_kernel_size": 2}, "quant_conv_kernel_size is 2"),
        ({"num_channels": 0}, "num_channels is 0; expected an integer from 1"),
        ({"num_channels": 1}, "num_channels is 1; expected 3: pictures of any kind are read as RGB"),
        ({"num_channels": 4}, "num_channels is 4; expected 3"),
        ({"hiden_dim": 8}, "VQVAEConfig has no field hiden_dim; expected some of .*'hidden_dim'"),
        ({"tiles": 2, "num_codes": 8}, "VQVAEConfig has no field num_codes, tiles; expected"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"codebook_init_scale": -1.0}, "codebook_init_scale is -1.0"),
        ({"autoencoder": "vqgan", "num_res_blocks": 1, "width_multipliers": []}, r"width_multipliers is \[\]"),
        ({"scales": [1, 8]}, r"scales is \[\[1, 1\], \[8, 8\]\]; expected None"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"vocab_size": 1}, "vocab_size is 1; expected an integer from 2"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"num_phi": -1}, "num_phi is -1"),
        ({"num_res_blocks": -1}, "num_res_blocks is -1"),
        ({"autoencoder": "vqgan", "num_res_blocks": 0}, "num_res_blocks is 0; expected an integer from 1"),
        ({"phi_ratio": 1.5}, "phi_ratio is 1.5"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"revival_threshold": float("nan")}, "revival_threshold is nan"),
        ({"codebook_ema_decay": 0}, r"codebook_ema_decay is 0; expected a number in \(0, 1\)"),
        ({"codebook_ema_decay": 1.0}, "codebook_ema_decay is 1.0"),
        ({"width_multipliers": [1, 0]}, r"width_multipliers is \[1, 0\]"),
        ({"beta": -1}, "beta is -1; expected a finite number of at least 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": "0.25"}, "beta is '0.25'"),
        ({"epsilon": float("inf")}, "epsilon is inf; expected a finite number above 0"),
        ({"phi_ratio": True}, "phi_ratio is True"),
        ({"codebook_init_scale": float("nan")}, "codebook_init_scale is nan"),
        ({"hidden_dim": 1.5}, "hidden_dim is 1.5; expected an integer from 1 to 65536"),
        ({"hidden_dim": 128.0}, "hidden_dim is 128.0"),
        ({"hidden_dim": True}, "hidden_dim is True"),
        ({"hidden_dim": None}, "hidden_dim is None"),
        ({"hidden_dim": 1 << 20}, "hidden_dim is 1048576; expected an integer from 1 to 65536"),
        ({"image_size": "x"}, "image_size is 'x'"),
        ({"image_size": 8.0}, "image_size is 8.0"),
        ({"image_size": True}, "image_size is"),
        ({"image_size": 10**6}, r"image_size is \[1000000, 1000000\]; expected sides of at most 65536 pixels"),
        ({"image_size": 1 << 16}, "the latent grid is .*, 268435456 tokens; expected at most 1048576"),
        ({"layout": "scales", "scales": [1, 10**6]}, r"scales ends with .*, 1000000000001 tokens; expected at most"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; expected an integer from 2 to 4294967296"),
        ({"vocab_size": "16"}, "vocab_size is '16'"),
        ({"vocab_size": 1 << 30, "embedding_dim": 4096}, "vocab_size 1073741824 and embedding_dim 4096 make a model"),
        ({"num_res_blocks": 10**6}, "num_res_blocks is 1000000; expected an integer from 0 to 1024"),
        ({"num_phi": 10**6}, "num_phi is 1000000"),
        ({"width_multipliers": 3}, "width_multipliers is 3; expected 1 to 16 positive integers"),
        ({"width_multipliers": [1] * 10**6}, "width_multipliers is .*; expected 1 to 16"),
        ({"width_multipliers": [1, 2.0]}, r"width_multipliers is \[1, 2.0\]"),
        ({"z_channels": 1.5}, "z_channels is 1.5"),
        ({"quant_conv_kernel_size": True}, "quant_conv_kernel_size is True"),
        ({"has_unit_codes": 1}, "has_unit_codes is 1; expected true or false"),
        ({"codebook": "vq"}, "codebook is 'vq'; expected one of"),
        ({"codebook": "lfq"}, "embedding_dim is 64; expected at most 32 with codebook 'lfq', a bit each"),
        ({"codebook": "lfq", "embedding_dim": 5}, "vocab_size is 16; expected 32 with codebook 'lfq' and"),
        ({"codebook": "fsq"}, "fsq_levels: got None; expected a list of whole numbers"),
        ({"codebook": "fsq", "fsq_levels": [8, 1]}, r"fsq_levels: bases is \(8, 1\)"),
        ({"codebook": "fsq", "fsq_levels": [4, 4]}, r"embedding_dim is 64; expected 2 with .* fsq_levels \[4, 4\]"),
        ({"codebook": "bsq", "embedding_dim": 4, "fsq_levels": [2] * 4}, "fsq_levels is .* expected None with"),
        ({**LFQ, "codebook_digits": [3, 5]}, r"codebook_digits: bases is \[3, 5\]; expected products of neighbours"),
        ({**LFQ, "codebook_update": "ema"}, "codebook_update is 'ema'; expected 'gradient' with codebook 'lfq'"),
        ({**LFQ, "codebook_init": "data"}, "codebook_init is 'data'; expected 'uniform' with codebook 'lfq'"),
        ({**LFQ, "codebook_metric": "cosine"}, "codebook_metric is 'cosine'; expected 'euclidean' with codebook"),
        ({**LFQ, "revival_threshold": 0.1}, "revival_threshold is 0.1; expected 0 with codebook 'lfq'"),
        ({**LFQ, "has_unit_codes": True}, "has_unit_codes is True; expected False with codebook 'lfq'"),
        ({**LFQ, "codebook": "fsq", "fsq_levels": [4, 2, 2], "beta": 1.0}, "beta is 1.0; expected 0.25 with codebook"),
        ({**LFQ, "codebook_gradient": "rotation"}, "codebook_gradient is 'rotation'; expected 'straight_through' with"),
        ({"codebook_gradient": "none"}, "codebook_gradient is 'none'; expected one of"),
        ({**INDEX, "codebook_update": "ema"}, "codebook_update is 'ema'; expected 'gradient' with codebook_gradient"),
        ({**INDEX, "has_unit_codes": True}, "has_unit_codes is True; expected False with codebook_gradient 'index'"),
        ({**INDEX, "codebook_metric": "cosine"}, "codebook_metric is 'cosine'; expected another one with"),
        ({"codebook": "simvq", "codebook_metric": "cosine"}, "codebook_metric is 'cosine'; expected 'euclidean' with"),
        ({"codebook": "simvq", "codebook_digits": [4, 4]}, r"codebook_digits is \[4, 4\]; expected None with codebook"),
        ({"codebook_digits": 4}, "codebook_digits: got 4; expected a list of whole numbers of at least 2"),
        ({"codebook_digits": [4, 5]}, r"vocab_size is 16; expected 20, their product, with codebook_digits \[4, 5\]"),
        ({"codebook_digits": [4, 4], "embedding_dim": 7}, r"embedding_dim is 7; expected a multiple of 2 with"),
        ({"attention_levels": [0]}, r"attention_levels is \[0\]; expected None with autoencoder 'simple'"),
        ({**MAGVIT2, "attention_levels": []}, r"attention_levels is \[\]; expected None with autoencoder 'magvit2'"),
        ({**MAGVIT2, "image_size": 16}, r"image_size is \[16, 16\]; expected more than one latent cell of 16×16"),
        ({**VQGAN, "attention_levels": [1, 0]}, r"attention_levels is \[1, 0\]; expected rising numbers .* 0 to 4"),
        ({**VQGAN, "attention_levels": [5]}, r"attention_levels is \[5\]"),
        ({**VQGAN, "attention_levels": [1, 1]}, r"attention_levels is \[1, 1\]"),
        ({**VQGAN, "attention_levels": [True]}, r"attention_levels is \[True\]"),
        ({**VQGAN, "attention_levels": 4}, "attention_levels is 4"),
        ({"codebook": "gumbel", "beta": 1.0}, "beta is 1.0; expected 0.25 with codebook 'gumbel'"),
        ({"codebook": "gumbel", "codebook_digits": [4, 4]}, r"codebook_digits is \[4, 4\]; expected None"),
        ({"codebook_metric": "dot"}, "codebook_metric is 'dot'; expected one of"),
        ({"z_channels": 32}, "z_channels is 32 and embedding_dim 64; expected them equal"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**options)
