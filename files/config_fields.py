"""Fields of a model's saved configuration that are none of its class: a misspelt option would be passed over."""

import inspect
from collections.abc import Collection

from transformers import PreTrainedConfig

# What transformers, diffusers and peft write or pass besides the fields of the base class.
_OF_LIBRARIES = {
    "adapters",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
}


def refuse_unknown_fields(config_class: type[PreTrainedConfig], names: Collection[str]) -> None:
    """Refuse names that neither a configuration nor transformers knows.

    Args:
        config_class: whose `__init__` names its fields.
        names: of the fields given besides these; those that begin with an underscore are a library's.

    Raises:
        ValueError: naming all that are unknown.
    """
    base = PreTrainedConfig().to_dict().keys() | _OF_LIBRARIES
    unknown = sorted(name for name in names if name not in base and not name.startswith("_"))
    if unknown:
        own = [name for name, p in inspect.signature(config_class).parameters.items() if p.kind != p.VAR_KEYWORD]
        raise ValueError(f"{config_class.__name__} has no field {', '.join(unknown)}; expected some of {own}")
