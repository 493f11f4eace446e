"""A training's output folder drawn as one page: curves, alarms, last values, pictures, how it ran."""

import base64
import html
import io
import json
import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from nextblock.data.reading import MAX_PICTURE_BYTES, read_picture
from nextblock.files.atomic import write_text_whole
from nextblock.files.regular import read_content, read_text

from .pictures import save_picture
from .training_log import ALARMS_NAME, RECORD_NAME, read_log, read_starts, series

SUFFIXES = (".html", ".png")
NUM_PANEL_COLUMNS = 2
# Titles of panels, and which figures share one; the first pattern that fits a figure takes it.
PANELS = {
    "loss": r"(train|eval)/loss",
    "loss by block": r"(train|eval)/block_\d+/loss",
    "accuracy": r"(train|eval)/accuracy",
    "accuracy by block": r"(train|eval)/block_\d+/accuracy",
    "codebook usage": r"(train|eval)/codebook/usage",
    "codebook perplexity": r"(train|eval)/codebook/perplexity",
    "codes never used": r"(train|eval)/codebook/num_dead_codes",
    "codebook usage by block": r"(train|eval)/codebook/block_\d+/usage",
    "codebook perplexity by block": r"(train|eval)/codebook/block_\d+/perplexity",
    "codes never used by block": r"(train|eval)/codebook/block_\d+/num_dead_codes",
    "entropy of the code's digits": r"(train|eval)/codebook/(lowest_)?digit_entropy",
    "gradient norm": r"train/([\w/]+[_/])?grad_norm",
    "learning rate": r"train/([\w/]+[_/])?learning_rate",
}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
img { max-width: 100%; image-rendering: pixelated; } table { border-collapse: collapse; }
td, th { border: 1px solid #ccc; padding: .2em .6em; text-align: left; vertical-align: top; }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; } .alarm { color: #a40000; } figcaption { color: #666; }
"""


def panels_of(records: list[dict]) -> dict[str, list[str]]:
    """Sort a log's figures into panels.

    Args:
        records: from `nextblock.evaluation.training_log.read_log`.

    Returns:
        Names of figures by panel title, in the panels' order; what fits no shared panel has one of its own.
    """
    names = dict.fromkeys(name for record in records for name in record)
    found: dict[str, list[str]] = {title: [] for title in PANELS}
    for name in names:
        if name in ("step", "time/total"):
            continue
        fitting = [title for title, pattern in PANELS.items() if re.fullmatch(pattern, name)]
        title = fitting[0] if fitting else name.split("/", 1)[-1]
        found.setdefault(title, []).append(name)
    return {title: sorted(members, key=_by_number) for title, members in found.items() if members}


def _by_number(name: str) -> list:
    """Sort block_10 after block_9, and training before evaluation."""
    parts = re.split(r"(\d+)", name.replace("train/", "0/", 1))
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in parts]


def draw_curves(records: list[dict]) -> Figure:
    """Draw every figure of a log over the steps.

    Args:
        records: from `nextblock.evaluation.training_log.read_log`.

    Returns:
        The figure; its panels are those of `panels_of`.
    """
    panels = panels_of(records)
    num_rows = max(1, -(-len(panels) // NUM_PANEL_COLUMNS))
    figure = Figure(figsize=(6 * NUM_PANEL_COLUMNS, 3.2 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, NUM_PANEL_COLUMNS, squeeze=False).flatten()
    for ax, (title, names) in zip(axes[: len(panels)], panels.items(), strict=True):
        _draw_panel(ax, title, names, records)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    return figure


def _draw_panel(ax: Axes, title: str, names: list[str], records: list[dict]) -> None:
    """Draw figures that share a panel; those of evaluations dashed, so few that each has a mark."""
    for name in names:
        steps, values = series(records, name)
        is_evaluation = name.startswith("eval/")
        style = {"linestyle": "--", "marker": "o"} if is_evaluation else {"marker": "." if len(steps) == 1 else None}
        ax.plot(steps, values, label=name, linewidth=1.2, markersize=4, **style)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=6 if len(names) > 6 else 7, ncols=1 + len(names) // 9)


def chosen_pictures(run_dir: Path) -> dict[str, list[Path]]:
    """Return the first, middle and last picture of every kind that a run drew.

    Args:
        run_dir: the run's folder.

    Returns:
        Paths by kind, "samples" say.
    """
    kinds: dict[str, list[Path]] = {}
    for path in sorted((run_dir / "pictures").glob("*_*.png")):
        kinds.setdefault(path.stem.rsplit("_", 1)[0], []).append(path)
    middles = {kind: [paths[0], paths[len(paths) // 2], paths[-1]] for kind, paths in kinds.items()}
    return {kind: list(dict.fromkeys(paths)) for kind, paths in middles.items()}


def html_page(run_dir: Path) -> str:
    """Describe a run on one page that needs no other file.

    Args:
        run_dir: the run's folder; only `metrics.jsonl` must be there.

    Returns:
        HTML.

    Raises:
        ValueError: if the folder has no log, or a line of it is no record.
    """
    records = read_log(run_dir)
    name = html.escape(run_dir.resolve().name)
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"]
    parts += [f"<h1>{name}</h1>", _starts_table(run_dir), _alarm_list(run_dir)]
    curves = io.BytesIO()
    draw_curves(records).savefig(curves, format="png", dpi=110)
    parts += ["<h2>Curves</h2>", embedded(curves.getvalue(), "curves"), _last_values(records)]
    for kind, paths in chosen_pictures(run_dir).items():
        parts.append(f"<h2>{html.escape(kind)}</h2>")
        for path in paths:
            step = path.stem.rsplit("_", 1)[1].lstrip("0") or "0"
            picture = embedded(read_content(path, MAX_PICTURE_BYTES), path.name)
            parts.append(f"<figure>{picture}<figcaption>step {html.escape(step)}</figcaption></figure>")
    if (run_dir / "config.yaml").is_file():
        text = html.escape(read_text(run_dir / "config.yaml"))
        parts.append(f"<h2>Configuration</h2><pre>{text}</pre>")
    return "\n".join(parts) + "\n</html>\n"


def embedded(png: bytes, name: str) -> str:
    """Return HTML that holds a picture itself."""
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _starts_table(run_dir: Path) -> str:
    """List what run.json says of every start of the run."""
    path = run_dir / RECORD_NAME
    if not path.is_file():
        return ""
    starts = read_starts(run_dir)
    names = dict.fromkeys(name for start in starts for name in start)
    rows = [[name, *(_cell(start.get(name)) for start in starts)] for name in names]
    return "<h2>Runs</h2>" + table(rows)


def _cell(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return "–" if value is None else str(value)


def table(rows: list[list[str]]) -> str:
    """Return an HTML table of cells of text."""
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _alarm_list(run_dir: Path) -> str:
    """List the alarms that rang."""
    path = run_dir / ALARMS_NAME
    lines = read_text(path).splitlines() if path.is_file() else []
    try:
        alarms = [html.escape(json.loads(line)["alarm"]) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    items = "".join(f"<li class=alarm>{alarm}</li>" for alarm in alarms) or "<li>none</li>"
    return f"<h2>Alarms</h2><ul>{items}</ul>"


def _last_values(records: list[dict]) -> str:
    """List every figure's last value."""
    rows = [["figure", "step", "last value"]]
    for names in panels_of(records).values():
        for name in names:
            steps, values = series(records, name)
            rows.append([name, str(steps[-1]), f"{values[-1]:.5g}"])
    return "<h2>Last values</h2>" + table(rows)


def write_report(run_dir: Path, output: Path) -> None:
    """Write a run's report.

    Args:
        run_dir: the run's folder.
        output: an .html file for the whole page, or a .png file for curves and last pictures.

    Raises:
        ValueError: if the output has another suffix, or the folder no readable log.
    """
    if output.suffix == ".html":
        write_text_whole(output, html_page(run_dir))
    elif output.suffix == ".png":
        save_picture(_stacked_image(run_dir), output)
    else:
        raise ValueError(f"output is {str(output)!r}; expected a name that ends in .html or .png")


def _stacked_image(run_dir: Path) -> Image.Image:
    """Draw the curves above the last picture of every kind."""
    curves = io.BytesIO()
    draw_curves(read_log(run_dir)).savefig(curves, format="png", dpi=110)
    images = [Image.open(curves).convert("RGB")]
    images += [read_picture(paths[-1]) for paths in chosen_pictures(run_dir).values()]
    size = max(image.width for image in images), sum(image.height for image in images)
    canvas, top = Image.new("RGB", size, "white"), 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    return canvas
