"""The repository itself: notebooks healthy, library in sync, settings that agree, nothing that should not be there."""
import ast
import configparser
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kdcode.cli import parse

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path for path in (ROOT/"nbs").rglob("*.ipynb") if not {"_proc", ".ipynb_checkpoints"} & set(path.parts))
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT/"settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
PROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text())


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def source(cell): return "".join(cell["source"])


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what is exported and cleaned, on which both can be done again."""
    folder = tmp_path_factory.mktemp("copy")/"kdcode"
    folder.mkdir()
    for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT/name, folder)
    for name in ("nbs", "kdcode"): shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns("__pycache__", "_proc", ".ipynb_checkpoints"))
    return folder


def nbdev(command, folder):
    subprocess.run([Path(sys.executable).parent/command], cwd=folder, check=True, capture_output=True)


def differing(copy, name, pattern):
    return [path.relative_to(copy).as_posix() for path in sorted((copy/name).rglob(pattern)) if path.read_bytes() != (ROOT/path.relative_to(copy)).read_bytes()]


def test_library_is_what_the_notebooks_export(copy):
    nbdev("nbdev_export", copy)
    assert differing(copy, "kdcode", "*.py") == []
    assert {path.name for path in (copy/"kdcode").glob("*.py")} == {path.name for path in (ROOT/"kdcode").glob("*.py")}


def test_notebooks_are_clean(copy):
    nbdev("nbdev_clean", copy)
    assert differing(copy, "nbs", "*.ipynb") == []


def test_readme_is_made_from_the_index(tmp_path):
    recipe = next(line for line in (ROOT/"Makefile").read_text().splitlines() if "nbconvert" in line)
    command = recipe.strip().replace("$(BIN)", str(Path(sys.executable).parent)).replace("$(README)", str(tmp_path/"README.md"))
    subprocess.run(command, shell=True, cwd=ROOT, check=True)
    assert (tmp_path/"README.md").read_text() == (ROOT/"README.md").read_text()
    for place in re.findall(r"\]\((?!https?:)(.*?)\)", (ROOT/"README.md").read_text()): assert (ROOT/place).exists(), place


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_healthy(path):
    notebook = json.loads(path.read_text())
    kernel = notebook["metadata"]["kernelspec"]
    assert (kernel["name"], kernel["language"]) == ("python3", "python")  # nbdev silently skips any other
    assert "widgets" not in notebook["metadata"]
    first = "".join(notebook["cells"][0]["source"]).splitlines()
    assert notebook["cells"][0]["cell_type"] == "markdown" and first[0].startswith("# ") and first[2].startswith("> ")
    for cell in code_cells(path):
        imports_only_what_it_should(cell, path)
        for output in cell["outputs"]: output_is_presentable(output, path)


def imports_only_what_it_should(cell, path):
    """A cell with an import at its top level holds only imports: a docs build executes import cells. A first cell may set the environment."""
    body = [node for node in ast.parse(source(cell)).body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
    if "os.environ" in source(cell) and "import os" in source(cell): return
    assert all(imports) or not any(imports), f"{path.name}: {source(cell)[:80]}"


def output_is_presentable(output, path):
    data = output.get("data", {})
    text = "".join(output.get("text", "")) + "".join("".join(value) for kind, value in data.items() if kind.startswith("text/"))
    assert output["output_type"] != "error", path.name
    assert "application/vnd.jupyter.widget-view+json" not in data, path.name
    assert not re.search(r"it/s\]|Warning|(?<![\w.])/(home|root|tmp|work|Users)/", text), f"{path.name}: {text[:200]}"


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem[:2].isdigit()], ids=lambda path: path.stem)
def test_module_notebook_has_outputs_and_tests(path):
    cells = code_cells(path)
    exported = [cell for cell in cells if source(cell).startswith("#| export")]
    tests = [cell for cell in cells if "test_" in source(cell) or "assert " in source(cell)]
    assert any(cell["outputs"] for cell in cells)
    assert len(tests) >= len(exported) / 3
    assert [cell["execution_count"] for cell in cells] == [None] * len(cells) or all(cell["execution_count"] for cell in cells if source(cell).strip())


@pytest.mark.parametrize("path", sorted(ROOT.glob("kdcode/*.py")) + sorted(ROOT.glob("configs/*.yaml")) + [ROOT/"Makefile", ROOT/"README.md"], ids=lambda path: path.name)
def test_no_absolute_path_and_no_secret(path):
    text = path.read_text()
    assert not re.search(r"""["'\s(=](/(home|root|tmp|work|usr|opt|Users)/|[A-Z]:\\\\)""", text)
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{12,}", text)


def test_named_configurations_are_valid():
    from kdcode.config import check_search_space, Config, load_config, read_experiment, read_yaml
    names = {path.stem: load_config(path).name for path in (ROOT/"configs").glob("*.yaml")}
    names |= {path.stem: read_experiment(path).config.name for path in (ROOT/"configs"/"experiments").glob("*.yaml")}
    assert len(names) > 3 and all(stem == name for stem, name in names.items())
    for path in (ROOT/"configs"/"tuning").glob("*.yaml"): check_search_space(read_yaml(path), Config())


def test_settings_agree_with_pyproject():
    project, nbdev3 = PROJECT["project"], PROJECT["tool"]["nbdev"]
    assert (SETTINGS["lib_name"], SETTINGS["description"]) == (project["name"], project["description"])
    assert project["requires-python"] == f">={SETTINGS['min_python']}"
    assert project["keywords"] == SETTINGS["keywords"].split()
    assert SETTINGS["version"] == importlib.metadata.version("kdcode")
    for key, value in nbdev3.items(): assert SETTINGS[key] == str(value), key


def test_constraints_pin_every_requirement():
    pins = {canonicalize_name(line.split("==")[0]): line for line in (ROOT/"constraints.txt").read_text().splitlines() if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in PROJECT["project"]["dependencies"] + [text for part in extras.values() for text in part]:
        requirement = Requirement(text)
        if requirement.name == "kdcode": continue
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{text} has no pin"
        assert requirement.specifier.contains(pins[name].split("==")[1]), f"{text} and {pins[name]}"
    assert {"torch==2.13.0", "nbdev==2.4.14"} <= set(pins.values())


def test_library_runs_without_nbdev_fastcore_and_ipython():
    needed, seen = ["kdcode"], set()
    while needed:  # everything that `pip install kdcode` brings
        name = canonicalize_name(needed.pop())
        if name in seen: continue
        seen.add(name)
        try: requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError: continue
        needed += [r.name for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {"torch", "transformers"} <= seen and not {"nbdev", "fastcore", "execnb", "ghapi"} & seen
    modules = [path.stem for path in (ROOT/"kdcode").glob("*.py") if path.stem != "_modidx"]
    block = "import sys; sys.modules |= {'nbdev': None, 'fastcore': None, 'IPython': None}; " + "; ".join(f"import kdcode.{name}" for name in modules if name != "__init__")
    subprocess.run([sys.executable, "-c", block], check=True, cwd=ROOT)


def test_no_pickled_weights():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split() or [path.name for path in ROOT.rglob("*")]
    assert not [name for name in tracked if name.endswith((".pt", ".pth", ".bin", ".pkl", ".ckpt"))]
    assert "trust_remote_code" not in "".join(path.read_text() for path in (ROOT/"kdcode").glob("*.py"))


@pytest.mark.parametrize("words", [("ruff", "check"), ("mypy",)], ids=lambda words: words[0])
def test_nothing_is_found_in_the_code(words):
    """What `make check` says: nothing. Both programs come with `make setup`, so one that is missing is a failure."""
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT/"Makefile").read_text(), re.M)[1]
    assert " ".join(["$(BIN)/" + words[0], *words[1:]]) in [line.strip() for line in recipe.splitlines()]
    done = subprocess.run([Path(sys.executable).parent/words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("words, kinds", [(("ruff", "check"), ("F821", "B015")), (("mypy",), ("arg-type", "attr-defined", "call-arg"))], ids=["ruff", "mypy"])
def test_a_mistake_in_the_code_is_found(tmp_path, words, kinds):
    """The control of the test above, with the same settings."""
    shutil.copy(ROOT/"pyproject.toml", tmp_path)
    (tmp_path/"kdcode").mkdir()
    (tmp_path/"kdcode"/"spoilt.py").write_text("import math\n\nundefined(1)\n1 == 2\n\ndef half(x: int) -> float: return x / 2\n\nhalf(1, 2)\nmath.sqrt('a')\nmath.nothing\n")
    done = subprocess.run([Path(sys.executable).parent/words[0], *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and all(kind in done.stdout for kind in kinds), done.stdout + done.stderr


def read(path): return yaml.safe_load((ROOT/path).read_text())


WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.y*ml"))
FORMS = sorted(path for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if path.name != "config.yml")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT/"Makefile").read_text(), re.M))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_sound(path):
    workflow = read(path)
    assert workflow["name"] and workflow[True]  # YAML reads the key `on` as true
    assert workflow["permissions"]  # a workflow gets the rights that it names, and no others
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", step.get("uses", "a/b@v1")), step
            assert set(re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))) <= TARGETS, step


def test_tests_run_on_every_python_that_is_supported():
    matrix = read(".github/workflows/test.yaml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert matrix == ["3.11", "3.12", "3.13"] and matrix[0] == SETTINGS["min_python"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_form_is_sound(path):
    """The keys that GitHub wants, and no option, file or field that this project doesn't have."""
    from kdcode.config import Config
    form = read(path)
    assert form["name"] and form["description"] and form["labels"]
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in asked} <= {"textarea", "input", "dropdown", "checkboxes"} and len({part["id"] for part in asked}) == len(asked)
    assert all(part["attributes"]["label"] for part in asked) and any(part.get("validations", {}).get("required") for part in asked)
    for part in asked: assert part["type"] != "dropdown" or len(set(part["attributes"]["options"])) == len(part["attributes"]["options"]) > 1
    for section, field in re.findall(r"`(?:--)?([a-z]+)\.([a-z_]+)\b[^`]*`", path.read_text()):
        assert (field in ("json", "md") and (section in ("run", "report"))) or hasattr(getattr(Config(), section), field), (section, field)


def test_citation_is_sound():
    citation, project = read("CITATION.cff"), PROJECT["project"]
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["message"]
    assert (citation["title"], citation["version"], citation["abstract"]) == (SETTINGS["lib_name"], SETTINGS["version"], SETTINGS["description"])
    assert (citation["license"], citation["repository-code"], citation["keywords"]) == (project["license"], SETTINGS["git_url"], project["keywords"])
    assert citation["authors"] == [{"name": SETTINGS["author"]}]
    for paper in citation["references"]: assert paper["title"] and paper["authors"] and 2000 < paper["year"] < 2030 and paper["url"].startswith("https://")


def test_hooks_are_of_this_environment():
    """Each names a program that make setup brings, and files that there are."""
    hooks = [hook for repository in read(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"] if repository["repo"] == "local"]
    tracked = [path.relative_to(ROOT).as_posix() for folder in ("nbs", "kdcode") for path in (ROOT/folder).rglob("*.*")] + ["README.md"]
    assert {hook["id"] for hook in hooks} == {"clean", "export", "readme", "ruff"}
    for hook in hooks:
        program, *words = hook["entry"].split()
        assert (Path(sys.executable).parent/Path(program).name).exists() if program.startswith(".venv/bin/") else program == "make" and set(words) - {"--silent"} <= TARGETS, hook
        assert hook["language"] == "system" and ("types_or" in hook or any(re.search(hook["files"], name) for name in tracked)), hook


def commands_to_copy() -> list[str]:
    """The `kdcode` commands of the README's and the documentation's shell blocks, and of the first lines of configurations."""
    pages = [ROOT/"README.md", ROOT/"CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("models/*/README.md")]
    blocks = [block for page in pages for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)]
    lines = [line for block in blocks for line in block.splitlines()] + [line.lstrip("# ") for file in ROOT.glob("configs/**/*.yaml") for line in file.read_text().splitlines() if re.match("# +kdcode ", line)]
    return sorted({match[1] for line in lines if (match := re.match(r"(?:\.venv/bin/)?kdcode (.+)", line))})


@pytest.mark.parametrize("command", commands_to_copy())
def test_command_to_copy_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command, comments=True)
    if arguments[-1] == "--help": arguments.pop()
    parse(arguments)
