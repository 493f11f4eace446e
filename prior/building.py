"""The untrained prior of a run, or the architecture of the one that it starts from."""

import warnings
from dataclasses import replace

from transformers import PreTrainedModel

from nextblock.files.fingerprints import model_fingerprint
from nextblock.files.stored_model import StoredModel, check_memory
from nextblock.training.initial_weights import find_initial_model, stored_model_types, with_initial_architecture

from .families import FAMILIES, family_config, of_stored_family
from .task import PriorTrainConfig
from .text_encoder import TextEncoder
from .text_training import set_empty_text, text_sizes

# What a fine-tuning may change of a prior: how it is trained.
TUNED_OPTIONS = ("dropout", "attention_dropout", "embedding_dropout", "drop_path", "label_smoothing")
TUNED_OPTIONS += ("adaln_gamma_init", "head_passes")


def with_initial_prior(
    config: PriorTrainConfig, tokenizer: PreTrainedModel, text_encoder: TextEncoder | None = None
) -> PriorTrainConfig:
    """Take the architecture of the prior that a run starts from, if it starts from one.

    Args:
        config: the run.
        tokenizer: whose tokens it predicts.
        text_encoder: reads its captions; None without.

    Raises:
        ValueError: if the given options are not that prior's, or it predicts other tokens or takes other texts.
    """
    init_from = config.loop.init_from
    if init_from is None:
        return config
    options = of_stored_family(config.model, stored_model_types(init_from).values())
    config_class = FAMILIES[options.family].config_class
    stored = config_class.from_pretrained(find_initial_model(init_from, config_class.model_type))
    tokens = {"layout": tokenizer.layout.to_dict(), "vocab_size": tokenizer.config.vocab_size}
    if getattr(stored, "head", "softmax") != "softmax":
        tokens["code_bases"] = _code_bases(tokenizer)
    if getattr(stored, "input_embedding", None) == "codes":
        tokens["embedding_dim"] = tokenizer.config.embedding_dim
    for name, value in tokens.items():
        if getattr(stored, name) != value:
            raise ValueError(
                f"init_from is {init_from!r}, a prior of {name} {getattr(stored, name)}; expected {value}, as the "
                f"tokenizer in {config.tokenizer!r} has it"
            )
    texts = {"text_dim": None} if text_encoder is None else text_sizes(text_encoder, config.text)
    for name in ("text_dim", "num_empty_positions"):
        if name in texts and getattr(stored, name, texts[name]) != texts[name]:
            raise ValueError(
                f"init_from is {init_from!r}, a prior of {name} {getattr(stored, name)}; expected {texts[name]}, as "
                f"text.encoder {config.text.encoder!r} and text.null {config.text.null!r} have it"
            )
    return replace(config, model=with_initial_architecture(options, config_class, init_from, TUNED_OPTIONS))


def _code_bases(tokenizer: PreTrainedModel) -> list[int] | None:
    """Return the bases of the digits of a tokenizer's codes, where they have any."""
    digits = tokenizer.quantizer.digits
    return None if digits is None else list(digits.bases)


def build_prior(
    config: PriorTrainConfig,
    tokenizer: PreTrainedModel,
    class_names: list[str],
    text_encoder: TextEncoder | None = None,
) -> StoredModel:
    """Make the untrained prior of a run.

    Args:
        config: the run.
        tokenizer: whose tokens it predicts.
        class_names: names by label; empty for an unconditional prior.
        text_encoder: reads the captions that the prior is conditioned on in place of classes.

    Returns:
        The prior, with gradient checkpointing and compilation where the run asks for them.

    Raises:
        ValueError: if the options do not go together, or ask for more than this machine's memory.
    """
    condition = {"num_classes": len(class_names), "class_names": class_names or None}
    if text_encoder is not None:
        condition = text_sizes(text_encoder, config.text)
    model_config = family_config(
        config.model,
        layout=tokenizer.layout.to_dict(),
        vocab_size=tokenizer.config.vocab_size,
        code_bases=_code_bases(tokenizer),
        embedding_dim=tokenizer.config.embedding_dim,
        tokenizer_fingerprint=model_fingerprint(tokenizer),
        **condition,
    )
    model_class = FAMILIES[config.model.family]
    check_memory(model_class, model_config)
    model = model_class(model_config)
    if text_encoder is not None:
        set_empty_text(model, text_encoder)
    if config.gradient_checkpointing:
        with warnings.catch_warnings():
            # Newer versions of transformers have another name for it, which the older ones supported here lack.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.torch_compile:
        model.compile()  # In place: names of weights, and with them checkpoints, stay what they are.
    return model
