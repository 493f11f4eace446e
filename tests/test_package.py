"""The package as a whole: what the wheel holds and serves, who imports whom, how long files may be."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUBPACKAGES = ["configs", "data", "evaluation", "pipelines", "prior", "tokenizer", "training"]
SOURCE_FOLDERS = [*SUBPACKAGES, "tests", "benchmarks"]
SOURCES = sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Lower ranks must not import higher ones while a module is loaded.
RANKS = {"configs": 0, "data": 0, "evaluation": 0, "training": 0, "tokenizer": 1, "prior": 1, "pipelines": 2}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 399, 59


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(nodes):
    """Absolute module names in import statements, `from a import b` giving a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in SUBPACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("nextblock-*.whl")
    return path


def test_wheel_holds_every_module_and_config(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = [path for name in SUBPACKAGES for path in (ROOT / name).rglob("*")]
    expected = {
        f"nextblock/{path.relative_to(ROOT)}" for path in files if path.suffix in (".py", ".yaml", ".json")
    }
    modules = {name for name in packed if ".dist-info/" not in name}
    assert modules == expected
    assert any(name.startswith("nextblock/configs/") and name.endswith(".yaml") for name in packed)
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_wheel_serves_shipped_configs_outside_the_clone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from nextblock.training import config; print(config.__file__, *sorted(config._shipped_configs()))"
    # Before site-packages, where the clone may be installed.
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    output = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    module_file, *names = output.stdout.split()
    assert module_file == str(tmp_path / "site/nextblock/training/config.py")
    configs = ROOT / "configs"
    assert names == sorted(str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml"))


@pytest.mark.parametrize("module", ["nextblock.tokenizer", "nextblock.prior"])
def test_models_import_neither_diffusers_nor_datasets(module, tmp_path):
    code = f"import sys, {module}; print([m for m in ('diffusers', 'datasets') if m in sys.modules])"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"


# Names that differ from what pip installs them by.
DISTRIBUTIONS = {"pil": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# Accelerate's tracker loads tensorboard; tests run on the others.
LOADED_BY_NAME = {"tensorboard", "pytest-xdist", "ruff", "setuptools"}


def imported_packages(*folders):
    """What pip installs for the imports below some folders, inside functions too."""
    modules = {
        module.split(".")[0]
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in folders
        for module in imported_modules(ast.walk(parse(path)))
    }
    names = {name.lower().replace("_", "-") for name in modules - set(sys.stdlib_module_names) - {"nextblock"}}
    return {DISTRIBUTIONS.get(name, name) for name in names}


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared, demo, dev = (
        {re.match(r"[\w-]+", line)[0] for line in lines}
        for lines in (project["dependencies"], extras["demo"], extras["dev"])
    )
    library = imported_packages(*SUBPACKAGES)
    assert library <= declared | demo
    assert declared | demo <= library | LOADED_BY_NAME
    everything = library | imported_packages("tests")
    assert everything <= declared | demo | dev
    assert dev - {"nextblock"} <= everything | LOADED_BY_NAME
    # One benchmark cuts its data out of the photographs of a package that nothing else needs.
    assert imported_packages("benchmarks") <= declared | {"scikit-image"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_rules(path):
    tree, num_lines = parse(path), len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES
    for module in imported_modules(ast.walk(tree)):
        assert module.split(".")[0] not in SOURCE_FOLDERS, f"bare import of {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
    names = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}


@pytest.mark.parametrize("package", RANKS)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        for module in imported_modules(parse(path).body):
            top, _, rest = module.partition(".")
            target = rest.split(".")[0]
            if top != "nextblock" or target == package:
                continue
            assert RANKS[target] <= RANKS[package], f"{path.relative_to(ROOT)} imports {module}"
            assert {target, package} != {"tokenizer", "prior"}, f"{path.relative_to(ROOT)} imports {module}"
