"""Models on disk: what is loaded is whole, and what is saved leaves nothing of an older save that a load could take."""

import os
import tempfile
from collections.abc import Collection, Mapping
from functools import wraps
from glob import escape
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .atomic import flush_to_disk, writing
from .regular import read_json
from .state_dicts import build_without_weights, read_state_dict

# More names than this of a kind say nothing new.
MAX_LISTED = 20
# Numbers: a model's tensors that no file need hold are few.
MAX_DRAWN = 1 << 28
ADAPTER_NAME = "adapter_config.json"
# What `torch.compile` of a part adds to the names in it.
COMPILED_PART = "_orig_mod."


class StoredModel(PreTrainedModel):
    """A `PreTrainedModel` that refuses weights that are not its own, where transformers would draw others at random.

    The module of a subclass also imports the name `PreTrainedModel`, by which diffusers finds that it can be loaded.
    """

    fitted_to_data: ClassVar[tuple[str, ...]] = ()
    """Tensors or modules that a fine-tuning starts anew where those of the given model have another shape."""

    def start_unfit(self, names: list[str]) -> None:
        """Give tensors their values that a fine-tuning did not find as they must be; by default they keep them.

        Args:
            names: of tensors among `fitted_to_data`.
        """

    def excused_tensors(self, saved: PreTrainedConfig) -> Collection[str]:
        """Return the tensors that a file need not have, or may have in vain, since it was saved under other options.

        Args:
            saved: the configuration beside the weights.
        """
        return ()

    @classmethod
    def from_pretrained(
        cls, *args, ignore_mismatched_sizes: bool = False, output_loading_info: bool = False, **kwargs
    ):
        """Load a model as `PreTrainedModel.from_pretrained` does, but only with all of its weights and no others.

        Args:
            args: folder or repository, and more of `PreTrainedModel.from_pretrained`.
            ignore_mismatched_sizes: whether tensors of another shape are drawn anew.
            output_loading_info: whether to return what was loaded beside the model.
            kwargs: of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: naming tensors that are missing, unexpected or misshapen.
        """
        # transformers' own refusal of shapes names no tensor.
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = super().from_pretrained(*args, **options, **kwargs)
        # Of a folder with an adapter, the report returned tells of the adapter alone.
        for report in (vars(model).pop("_own_loading_info", info), info):
            misshapen = [] if ignore_mismatched_sizes else report["mismatched_keys"]
            wrong = {*report["missing_keys"], *report["unexpected_keys"]}
            excused = _excused(model, args, kwargs) if wrong else ()
            problems = {
                "missing": sorted(set(report["missing_keys"]).difference(excused)),
                "unexpected": sorted(set(report["unexpected_keys"]).difference(excused)),
                "misshapen": sorted(f"{name} {tuple(got)}, expected {tuple(own)}" for name, got, own in misshapen),
            }
            if any(problems.values()):
                source = str(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
                raise ValueError(f"the weights in {source!r} are not those of a {cls.__name__}:{_listed(problems)}")
        return (model, info) if output_loading_info else model

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        """Keep transformers' report on the model itself; refuse to draw anew what would take gigabytes."""
        own = model.state_dict()
        lost = {*loading_info.missing_keys, *(name for name, *_ in loading_info.mismatched_keys)} & own.keys()
        if sum(own[name].numel() for name in lost) > MAX_DRAWN:
            shapes = sorted(f"{name} {tuple(own[name].shape)}" for name in lost)
            listed = _listed({"missing or misshapen": shapes})
            raise ValueError(f"the weights stored are not those of the {type(model).__name__} configured:{listed}")
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        model._own_loading_info = loading_info.to_dict()
        return loading_info

    # diffusers reads from the signature what it may pass.
    @wraps(PreTrainedModel.save_pretrained, assigned=())
    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, variant: str | None = None, **kwargs):
        """Save a model as `PreTrainedModel.save_pretrained` does; files of an older save go once the new are there.

        Args:
            save_directory: the folder.
            args, push_to_hub, variant, kwargs: of `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: if the folder is a file, or holds an adapter that every load would put onto the model.
        """
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"save_directory is {str(folder)!r}, a file; expected a folder")
        if (folder / ADAPTER_NAME).exists() and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"save_directory is {str(folder)!r}, which holds {ADAPTER_NAME}: every load would put that adapter "
                "onto the model; expected a folder without an adapter"
            )
        if kwargs.get("distributed_checkpoint"):  # All processes write into one folder, other files than these.
            super().save_pretrained(folder, *args, push_to_hub=push_to_hub, variant=variant, **kwargs)
            return
        if len(args) < 2 and kwargs.get("state_dict") is None:
            state = self.state_dict()
            if any(COMPILED_PART in name for name in state):
                kwargs["state_dict"] = {name.replace(COMPILED_PART, ""): tensor for name, tensor in state.items()}
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder), tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as aside:
            super().save_pretrained(aside, *args, variant=variant, **kwargs)
            _replace(folder, Path(aside), variant)
        if push_to_hub:  # transformers uploads what it has just written.
            super().save_pretrained(folder, *args, push_to_hub=True, variant=variant, **kwargs)


def check_memory(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Refuse a model that this machine's memory cannot hold, before any of it is taken.

    Args:
        model_class: what is to be built.
        config: of what size.

    Raises:
        ValueError: naming its size and its largest tensors.
    """
    state = build_without_weights(model_class, config).state_dict()
    sizes = {f"{name} {tuple(tensor.shape)}": tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    size, memory = sum(sizes.values()), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        largest = ", ".join(sorted(sizes, key=sizes.get)[:-4:-1])
        raise ValueError(
            f"a {model_class.__name__} of these options has {size / 1e9:.1f} GB of weights ({largest}, …); expected "
            f"at most the {memory / 1e9:.1f} GB of this machine's memory"
        )


def weight_patterns(variant: str | None) -> list[str]:
    """Return the file names of a model's weights as patterns: one whole file, or shards, and the shards' index."""
    part = "" if variant is None else f".{escape(variant)}"
    # In this order of writing, what a load looks for first comes last.
    shards = "-" + "[0-9]" * 5 + "-of-" + "[0-9]" * 5
    return [f"model{part}{shards}.safetensors", f"model.safetensors.index{part}.json", f"model{part}.safetensors"]


def read_stored_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a saved model by name, from the files that a load would take.

    Args:
        folder: of the model; variants are left alone.

    Raises:
        ValueError: if there are no weights, or a shard is missing or does not hold what the index says.
    """
    folder = Path(folder)
    _, index, whole = weight_patterns(None)
    if (folder / whole).exists():
        return read_state_dict(folder / whole)
    if not (folder / index).exists():
        raise ValueError(f"{str(folder)!r} holds no {whole}; expected the folder of a saved model")
    places = read_json(folder / index)["weight_map"]
    shards = {name: read_state_dict(folder / name) for name in sorted(set(places.values()))}
    lost = [f"{name} in {shard}" for name, shard in places.items() if name not in shards[shard]]
    if lost:
        raise ValueError(f"the shards in {str(folder)!r} do not hold what {index} says:{_listed({'missing': lost})}")
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def _replace(folder: Path, aside: Path, variant: str | None) -> None:
    """Move what was saved aside into a folder, then delete weights there that it did not replace."""
    saved = {path.relative_to(aside) for path in aside.rglob("*") if path.is_file()}
    weights = [path for pattern in weight_patterns(variant) for path in sorted(saved) if path.match(pattern)]
    for path in [*sorted(saved.difference(weights)), *weights]:
        flush_to_disk(aside / path)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (aside / path).replace(folder / path)
    flush_to_disk(folder)
    if weights:  # A process that is not the main one, or a save of an adapter alone, replaces none.
        for pattern in weight_patterns(variant):
            for path in folder.glob(pattern):
                if path.relative_to(folder) not in saved:
                    path.unlink()


def _excused(model: StoredModel, args: tuple, options: Mapping) -> Collection[str]:
    """Return what the configuration beside the weights excuses; weights without one are excused nothing."""
    source = args[0] if args else options.get("pretrained_model_name_or_path")
    if source is None:
        return ()
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    options = {name: options[name] for name in names if name in options}
    saved, _ = model.config_class.get_config_dict(source, **options)
    if "model_type" not in saved:
        return ()
    return model.excused_tensors(model.config_class.from_dict(saved))


def _listed(problems: Mapping[str, list[str]]) -> str:
    """List what is wrong with tensors, a line each."""
    lines = []
    for kind, names in problems.items():
        lines += [f"{kind}: {name}" for name in names[:MAX_LISTED]]
        if len(names) > MAX_LISTED:
            lines.append(f"{kind}: {len(names) - MAX_LISTED} more")
    return "\n  " + "\n  ".join(lines)
