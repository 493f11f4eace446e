"""Jobs over streamed datasets leave the bytes of jobs over the same dataset read in any order, killed or not."""

import json

import pytest

from nextblock.tokenize_images import TokenizeConfig, tokenize


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def arguments(image_folder, tokenize_arguments, tmp_path, monkeypatch) -> list[str]:
    """The job over Parquet files of the images, of which two are broken."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["blue tit", "great tit", "wren"])}
    )
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        files = sorted((image_folder / split).rglob("*.png"))
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        labels = [sorted(path.name for path in (image_folder / split).iterdir()).index(f.parent.name) for f in files]
        if split == "train":
            images[5]["bytes"], images[30]["bytes"] = b"no picture", images[30]["bytes"][:60]
        for number in range(2):
            part = {"image": images[number::2], "label": labels[number::2]}
            rows = datasets.Dataset.from_dict(part, features=features)
            rows.to_parquet(tmp_path / "rows" / f"{split}-{number}.parquet", batch_size=7)
    source = ["--data.source", "datasets", "--data.path", str(tmp_path / "rows")]
    return [*tokenize_arguments, *source, "--rows_per_shard", "9", "--batch_size", "4", "--on_error", "skip"]


@pytest.mark.slow
def test_a_streamed_job_killed_or_not_leaves_the_bytes_of_a_job_that_is_not_streamed(
    arguments, run_killed_jobs, run_here, tmp_path
):
    assert run_killed_jobs(tmp_path, [*arguments, "--data.is_streamed", "true"], num_kills=1)["kills"] == 1
    run_here(tokenize, TokenizeConfig, *arguments, "--output_dir", tmp_path / "not_streamed")
    expected = files_of(tmp_path / "not_streamed")
    assert files_of(tmp_path / "undisturbed") == expected
    lines = [json.loads(line) for line in expected["rejected.jsonl"].splitlines()]
    assert {line["image_id"]: line["reason"] for line in lines} == {"train/26": "corrupt", "train/15": "truncated"}
    streamed = [*arguments, "--data.is_streamed", "true", "--num_workers", 2]
    run_here(tokenize, TokenizeConfig, *streamed, "--output_dir", tmp_path / "workers")
    assert files_of(tmp_path / "workers") == expected


def test_a_streamed_job_stops_at_a_bad_image(arguments, tmp_path, run_here):
    streamed = [*arguments, "--data.is_streamed", "true", "--on_error", "stop"]
    with pytest.raises(ValueError, match=r"train/15 of column 'image'.*on_error=skip leaves such images out"):
        run_here(tokenize, TokenizeConfig, *streamed, "--output_dir", tmp_path / "tokens")
