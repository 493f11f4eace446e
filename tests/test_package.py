"""The package as a whole: what the wheel holds and serves, who imports whom, how long files may be."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module, metadata
from pathlib import Path

import pytest

import nextblock

ROOT = Path(__file__).parents[1]
# Who may import whom: a folder imports those of a lower rank and itself, tokenizer and prior never each other.
RANKS = {
    "configs": 0,
    "files": 0,
    "data": 1,
    "evaluation": 2,
    "training": 3,
    "tokenizer": 4,
    "prior": 4,
    "pipelines": 5,
    "nextblock": 6,
}
SOURCE_FOLDERS = [*RANKS, "tests", "benchmarks"]
SOURCES = sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Modules of ours that need an optional package, and are imported where it is known to be there.
OPTIONAL_MODULES = {"nextblock.pipelines.demo_page"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 399, 59


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path, nodes):
    """Absolute names of modules in import statements; `from a import b` gives a.b, `from .c import d` gives its own."""
    folder = path.relative_to(ROOT).parts[0]
    package = "nextblock" if folder == "nextblock" else f"nextblock.{folder}"
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join([*[package] * node.level, *[node.module] * bool(node.module)])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def folder_of(module):
    """The folder of one of our modules; None for another's."""
    first, *rest = module.split(".")
    if first != "nextblock":
        return None
    return rest[0] if rest and rest[0] in RANKS else "nextblock"


def nodes_in_functions(tree):
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [node for function in functions for node in ast.walk(function)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in RANKS:
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
    files = [path.relative_to(ROOT) for name in RANKS for path in (ROOT / name).rglob("*")]
    expected = {
        str(path if path.parts[0] == "nextblock" else "nextblock" / path)
        for path in files
        if path.suffix in (".py", ".yaml", ".json", ".typed")
    }
    modules = {name for name in packed if ".dist-info/" not in name}
    assert modules == expected
    assert any(name.startswith("nextblock/configs/") and name.endswith(".yaml") for name in packed)
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_wheel_serves_shipped_configs_outside_the_clone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from nextblock import command_line as c; print(c.__file__, *sorted(c.shipped_configs()))"
    # Before site-packages, where the clone may be installed.
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    output = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    module_file, *names = output.stdout.split()
    assert module_file == str(tmp_path / "site/nextblock/command_line.py")
    configs = ROOT / "configs"
    assert names == sorted(str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml"))


def test_models_import_neither_diffusers_nor_datasets(tmp_path):
    code = "import sys, nextblock.tokenizer, nextblock.prior; print([*{'diffusers', 'datasets'} & {*sys.modules}])"
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
        for module in imported_modules(path, ast.walk(parse(path)))
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
    library = imported_packages(*RANKS)
    assert library <= declared | demo
    assert declared | demo <= library | LOADED_BY_NAME
    everything = library | imported_packages("tests")
    assert everything <= declared | demo | dev
    assert dev - {"nextblock"} <= everything | LOADED_BY_NAME
    # One benchmark cuts its data out of the photographs of a package that nothing else needs.
    benchmarks = {path.stem.replace("_", "-") for path in (ROOT / "benchmarks").glob("*.py")}
    assert imported_packages("benchmarks") <= declared | {"scikit-image", "vector-quantize-pytorch"} | benchmarks


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_rules(path):
    tree, num_lines = parse(path), len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES
    for module in imported_modules(path, ast.walk(tree)):
        assert module.split(".")[0] not in {*SOURCE_FOLDERS} - {"nextblock"}, f"bare import of {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
    names = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}


@pytest.mark.parametrize("folder", RANKS)
def test_imports_point_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        where, tree = path.relative_to(ROOT), parse(path)
        for module in imported_modules(path, ast.walk(tree)):
            target = folder_of(module)
            if target not in (None, folder):
                assert RANKS[target] < RANKS[folder], f"{where} imports {module}"
        late = [m for m in imported_modules(path, nodes_in_functions(tree)) if folder_of(m) is not None]
        hidden = [m for m in late if not any(m.startswith(f"{name}.") for name in OPTIONAL_MODULES)]
        assert not hidden, f"{where} imports {hidden} inside a function"


def test_importing_the_package_loads_no_library(tmp_path):
    code = "import sys, nextblock as n; print(n.__version__, sorted({'torch', 'numpy'} & {*sys.modules}))"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert output == f"{metadata.version('nextblock')} []\n"


def test_public_names_are_there_and_the_type_checker_knows_the_same():
    names = {name for name in dir(nextblock) if not name.startswith("_") and name in nextblock._HOMES}
    assert names == set(nextblock._HOMES)
    for name, home in nextblock._HOMES.items():
        assert getattr(nextblock, name) is getattr(import_module(home), name)
    known = imported_modules(ROOT / "nextblock/__init__.py", ast.walk(parse(ROOT / "nextblock/__init__.py")))
    assert {module for module in known if module.startswith("nextblock.")} == {
        f"{home}.{name}" for name, home in nextblock._HOMES.items()
    }
    with pytest.raises(AttributeError, match="has no attribute 'VQGAN'"):
        nextblock.VQGAN  # noqa: B018
