"""Fields of configurations: unknown ones are refused by name, those of the libraries pass, saved ones come back."""

import json

import pytest
from transformers import AutoConfig

from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig

both = pytest.mark.parametrize("config_class", [VQVAEConfig, BlockPriorConfig])
OF_LIBRARIES = {
    "_name_or_path": "x",
    "_attn_implementation": "sdpa",
    "architectures": ["A"],
    "dtype": "bfloat16",
    "id2label": {0: "a"},
    "model_type": "m",
    "quantization_config": {},
    "return_dict": False,
    "torch_dtype": "float16",
    "transformers_version": "5.0.0",
    "use_cache": False,
}


@both
@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_what_the_libraries_pass_is_taken(config_class, name):
    config_class(**{name: OF_LIBRARIES[name]})


@both
def test_unknown_fields_of_a_call_and_of_a_folder_are_refused(config_class, tmp_path):
    with pytest.raises(ValueError, match=f"{config_class.__name__} has no field depth, widht; expected some of"):
        config_class(widht=3, depth=2)
    config_class().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"widht": 3}))
    for loader in (config_class, AutoConfig):
        with pytest.raises(ValueError, match=f"{config_class.__name__} has no field widht"):
            loader.from_pretrained(tmp_path)


@pytest.mark.parametrize(("model_class", "config_class"), [(VQVAE, VQVAEConfig), (BlockPrior, BlockPriorConfig)])
def test_what_transformers_writes_beside_a_model_comes_back(model_class, config_class, tmp_path):
    model_class(config_class()).half().save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(model.config) is config_class


@both
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_attn_implementation", "someone/kernel"),
        ("attn_implementation", "someone/kernel"),
        ("experts_implementation", "someone/kernel"),
        ("dtype", "os.system"),
        ("torch_dtype", "nn"),
        ("quantization_config", "text"),
    ],
)
def test_values_that_libraries_would_stumble_over_or_run_are_refused(config_class, name, value):
    with pytest.raises(ValueError, match=f"{name} is '{value}'; expected"):
        config_class(**{name: value})
