"""Files and folders that are not what an option wants: missing, empty, cut short, of another kind, of other names."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

BINARY = b"\xff\xfe\x00\x01"
# Fields of a tokenizer's config.json, of a manifest and of a pipeline's index that are wrong.
TOKENIZERS = {
    "bert": {"model_type": "bert"},
    "untyped": {"model_type": None},
    "words": {"vocab_size": "many"},
    "null": {"vocab_size": None},
    "huge": {"vocab_size": 10**30},
    "scales": {"scales": [1, 2, "x"]},
    "other": {"vocab_size": 25},
    "extra": {"codes": 3},
}
MANIFESTS = {
    "extra": {"x": 1},
    "layout": {"layout": {"kind": "x"}},
    "number": {"layout": 3},
    "splits": {"splits": []},
    "vocab": {"vocab_size": "many"},
    "version": {"format_version": 9},
    "data": {"data": {}},
    "names": {"class_names": [1, 2, 3]},
    "name": {"class_names": "wren"},
    "few": {"class_names": ["wren"]},
}
CONFIGS = {
    "self": "loop: &a {num_steps: *a}\n",
    "selflist": "output_dir: &a [*a]\n",
    "list": "- 1\n",
    "scalar": "hello\n",
    "number": "3\n",
    "twice": "output_dir: a\noutput_dir: b\n",
    "twiceinside": "loop: {num_steps: 1, num_steps: 2}\n",
    "tab": "loop:\n\tnum_steps: 3\n",
    "open": "loop: {num_steps: 1\n",
    "tag": "output_dir: !!python/object:os.system {}\n",
    "anchor": "loop: *nothing\n",
    "documents": "a: 1\n---\nb: 2\n",
    "intkey": "1: 2\n",
    "deep": "a: " + "[" * 1100,
    "bomb": "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
    "misspelt": "loop: {num_stepz: 3}\n",
    "group": "loop: [1, 2]\n",
    "groupfile": "loop: /dev/zero\n",
    "groupinside": "discriminator: {optimizer: /dev/zero}\n",
    "groupdotted": "discriminator.optimizer: /dev/zero\n",
    "class": "loop: {class_path: this.Config}\n",
    "null": "loop: {num_workers: null}\n",
    "text": "loop: {batch_size: many}\n",
    "names": "data: {source: folder, path: x, class_names: [1, 2]}\n",
}


def make_wrong_places(root: Path, *, images: Path, tokenizer: Path, tokens: Path, pipeline: Path) -> dict[str, Path]:
    """Make them.

    Args:
        root: a new folder.
        images, tokenizer, tokens, pipeline: good ones.

    Returns:
        Paths by name, the good ones among them; `new` is not there, nor is `missing`.
    """
    good = {"images": images, "tokenizer": tokenizer, "tokens": tokens, "pipeline": pipeline}
    places = good | {"prior_model": pipeline / "prior", "missing": root / "nowhere", "new": root / "new"}
    for name in ("empty", "used"):
        places[name] = root / name
        places[name].mkdir()
    (root / "used" / "mine.txt").write_text("mine")
    places["file"] = root / "notes.txt"
    places["file"].write_text("hello\n")

    def copied(name: str, of: str, *left_out: str) -> Path:
        places[name] = shutil.copytree(places[of], root / name, ignore=shutil.ignore_patterns(*left_out))
        return places[name]

    _break_models(copied)
    _break_tokens(copied, tokens)
    for name, content in (CONFIGS | {"binary": BINARY, "latin": "output_dir: café".encode("latin1")}).items():
        places[f"yaml_{name}"] = root / f"{name}.yaml"
        places[f"yaml_{name}"].write_bytes(content if isinstance(content, bytes) else content.encode())
    places |= _checkpoint_files(root, tokenizer) | _samples(root) | _runs(root) | _image_folders(root, images)
    return places


def _break_models(copied) -> None:
    weights, config = "model.safetensors", "config.json"
    copied("tokenizer_no_weights", "tokenizer", weights)
    copied("tokenizer_no_config", "tokenizer", config)
    folder = copied("tokenizer_cut", "tokenizer")
    (folder / weights).write_bytes((folder / weights).read_bytes()[:200])
    (copied("tokenizer_text", "tokenizer") / weights).write_text("hello")
    (copied("tokenizer_blank", "tokenizer") / weights).write_bytes(b"")
    torch.save({"a": torch.zeros(1)}, copied("tokenizer_pickle", "tokenizer", weights) / "pytorch_model.bin")
    for name, content in {"binary": BINARY, "list": b"[1]", "blankjson": b"", "cutjson": b'{"model_type": '}.items():
        (copied(f"tokenizer_{name}", "tokenizer") / config).write_bytes(content)
    os.truncate(copied("tokenizer_outsized", "tokenizer") / config, 1 << 40)
    folder = copied("among_pipes", "empty")
    for make in (os.mkfifo, Path.touch, Path.mkdir):
        (folder / make.__name__).mkdir()
        make(folder / make.__name__ / config)
    for name, change in TOKENIZERS.items():
        path = copied(f"tokenizer_{name}", "tokenizer") / config
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for name, value in (("nan", float("nan")), ("strange", 1.0)):
        path = copied(f"tokenizer_{name}", "tokenizer") / weights
        tensors = {key: tensor + value for key, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    index = "model_index.json"
    copied("pipeline_no_index", "pipeline", index)
    copied("pipeline_no_prior", "pipeline", "prior")
    (copied("pipeline_no_weights", "pipeline") / "prior" / weights).unlink()
    folder = copied("pipeline_cut", "pipeline") / "prior"
    (folder / weights).write_bytes((folder / weights).read_bytes()[:200])
    foreign = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    contents = {"binary": BINARY, "list": b"[]", "blank": b"{}", "foreign": json.dumps(foreign).encode()}
    for name, content in contents.items():
        (copied(f"pipeline_{name}", "pipeline") / index).write_bytes(content)
    folder = copied("pipeline_swapped", "pipeline")
    for old, new in (("prior", "aside"), ("tokenizer", "prior"), ("aside", "tokenizer")):
        (folder / old).rename(folder / new)


def _break_tokens(copied, tokens: Path) -> None:
    copied("tokens_no_manifest", "tokens", "manifest.json")
    copied("tokens_no_data", "tokens", "data")
    shard = min((copied("tokens_cut", "tokens") / "data").glob("train*"))
    shard.write_bytes(shard.read_bytes()[:100])
    manifest = json.loads((tokens / "manifest.json").read_text())
    contents = {name: json.dumps(manifest | change).encode() for name, change in MANIFESTS.items()}
    del manifest["layout"]
    contents |= {"binary": BINARY, "list": b"[]", "lacking": json.dumps(manifest).encode()}
    for name, content in contents.items():
        (copied(f"tokens_{name}", "tokens") / "manifest.json").write_bytes(content)


def _checkpoint_files(root: Path, tokenizer: Path) -> dict[str, Path]:
    saved = {}
    for name, content in (("object", {"a": Path("x")}), ("list", [torch.zeros(1)]), ("other", {"a": torch.zeros(999)})):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        saved[f"{name}.pth"] = buffer.getvalue()
    saved |= {"text.pth": b"hello", "blank.pth": b"", "pickle.pth": pickle.dumps({"a": 1})}
    saved |= {"cut.pth": saved["other.pth"][:2000], "text.safetensors": b"hello", "blank.safetensors": b""}
    saved["cut.safetensors"] = (tokenizer / "model.safetensors").read_bytes()[:200]
    for name, content in saved.items():
        (root / name).write_bytes(content)
    return {name.replace(".", "_"): root / name for name in saved}


def _samples(root: Path) -> dict[str, Path]:
    images, labels, places = np.zeros((6, 16, 16, 3), np.uint8), np.zeros(6, np.int64), {}
    arrays = {
        "names": {"a": labels},
        "size": {"arr_0": images[:, :8, :8], "arr_1": labels},
        "flat": {"arr_0": images[:, 0, 0, 0], "arr_1": labels},
        "object": {"arr_0": np.array([{}]), "arr_1": labels[:1]},
        "float": {"arr_0": images / 255, "arr_1": labels},
        "labels": {"arr_0": images, "arr_1": labels + 99},
        "none": {"arr_0": images[:0], "arr_1": labels[:0]},
        "length": {"arr_0": images, "arr_1": labels[:5]},
        "good": {"arr_0": images, "arr_1": labels},
    }
    for name in (*arrays, "text", "blank", "cut", "no_images", "no_config", "yaml"):
        places[f"samples_{name}"] = folder = root / f"samples_{name}"
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 0\n")
        np.savez(folder / "images.npz", **arrays.get(name, arrays["good"]))
    path = places["samples_cut"] / "images.npz"
    path.write_bytes(path.read_bytes()[:900])
    (places["samples_text"] / "images.npz").write_text("hello")
    (places["samples_blank"] / "images.npz").write_bytes(b"")
    (places["samples_no_images"] / "images.npz").unlink()
    (places["samples_no_config"] / "config.yaml").unlink()
    (places["samples_yaml"] / "config.yaml").write_bytes(BINARY)
    return places


def _runs(root: Path) -> dict[str, Path]:
    logs = {"binary": BINARY, "text": b"hello\n", "list": b"[1]\n", "words": b'{"step": "x", "train/loss": "y"}\n'}
    places = {}
    for name in (*logs, "good", "no_log", "record", "recordlist"):
        places[f"run_{name}"] = folder = root / f"run_{name}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_bytes(logs.get(name, b'{"step": 1, "train/loss": 2.0}\n'))
    (places["run_no_log"] / "metrics.jsonl").unlink()
    (places["run_record"] / "run.json").write_text("hello")
    (places["run_recordlist"] / "run.json").write_text("[]")
    return places


def _image_folders(root: Path, images: Path) -> dict[str, Path]:
    picture = next((images / "train").rglob("*.png")).read_bytes()
    contents = {"text": b"hello", "blank": b"", "cut": picture[: len(picture) // 2]}
    places = {}
    for name, content in contents.items():
        places[f"images_{name}"] = root / f"images_{name}"
        for split in ("train", "test"):
            (root / f"images_{name}" / split / "a").mkdir(parents=True)
            (root / f"images_{name}" / split / "a" / "x.png").write_bytes(content)
    places["images_none"] = root / "images_none"
    (root / "images_none" / "train" / "a").mkdir(parents=True)
    places["images_notes"] = root / "images_notes"
    places["images_notes"].mkdir()
    (places["images_notes"] / "a.txt").write_text("x")
    return places

