import json

import pytest

from nextblock.evaluation.report import Aim, Row, environment, format_number, format_table, write_json


def test_aims_are_bounds():
    floor, ceiling = Aim.parse(">= 28.5"), Aim.parse("<=2.8")
    assert floor.is_met(28.5) and not floor.is_met(28.49)
    assert ceiling.is_met(2.8) and not ceiling.is_met(2.81)
    assert not floor.is_met(float("nan"))
    assert (str(floor), str(ceiling)) == (">= 28.5", "<= 2.8")
    with pytest.raises(ValueError, match="aim is '28.5'; expected a bound"):
        Aim.parse("28.5")


def test_table_shows_figures_beside_their_aims():
    rows = [
        Row("a", "PSNR, dB", 29.31234, Aim(28.5, True)),
        Row("b", "Frechet over floor", 3.0, Aim(2.8, False), "floor 0.25"),
        Row("c", "loss", 0.5),
    ]
    assert format_table(rows).splitlines() == [
        "figure              value   aim      verdict  beside",
        "------------------  ------  -------  -------  ----------",
        "PSNR, dB            29.31   >= 28.5  met",
        "Frechet over floor  3.000   <= 2.8   MISSED   floor 0.25",
        "loss                0.5000",
    ]


def test_numbers_have_four_digits():
    assert [format_number(value) for value in (0.98361, 31.52, 1234.6, 251904)] == [
        "0.9836",
        "31.52",
        "1235",
        "251,904",
    ]


def test_json_is_strict_and_replaces_the_old_report(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    write_json({"psnr": [float("inf"), 1.5], "nested": {"nan": float("nan")}}, path)
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content == {"psnr": ["inf", 1.5], "nested": {"nan": "nan"}}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_environment_names_versions():
    versions = environment()
    assert versions["torch"][0].isdigit() and versions["python"].startswith("3.")
