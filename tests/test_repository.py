"""The repository itself: healthy notebooks, exported library in sync, consistent settings, the field's vocabulary."""
import ast
import configparser
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kdcode.cli import parse

ROOT = Path(__file__).parent.parent
SKIPPED_FOLDERS = {"_proc", ".ipynb_checkpoints"}
NOTEBOOKS = sorted(path for path in (ROOT/"nbs").rglob("*.ipynb") if not SKIPPED_FOLDERS & set(path.parts))
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT/"settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
PROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text())
BIN = Path(sys.executable).parent


def cells(path): return json.loads(path.read_text())["cells"]


def code_cells(path): return [cell for cell in cells(path) if cell["cell_type"] == "code"]


def source(cell): return "".join(cell["source"])


def name(path): return path.name


# Notebooks and the exported library

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the notebooks and the library, to export and clean again."""
    folder = tmp_path_factory.mktemp("copy")/"kdcode"
    folder.mkdir()
    for file in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT/file, folder)
    ignored = shutil.ignore_patterns("__pycache__", *SKIPPED_FOLDERS)
    for part in ("nbs", "kdcode"): shutil.copytree(ROOT/part, folder/part, ignore=ignored)
    return folder


def nbdev(command, folder): subprocess.run([BIN/command], cwd=folder, check=True, capture_output=True)


def differing(copy, folder, pattern):
    files = [path.relative_to(copy) for path in sorted((copy/folder).rglob(pattern))]
    return [str(file) for file in files if (copy/file).read_bytes() != (ROOT/file).read_bytes()]


def test_library_is_what_the_notebooks_export(copy):
    nbdev("nbdev_export", copy)
    assert differing(copy, "kdcode", "*.py") == []
    assert set(map(name, (copy/"kdcode").glob("*.py"))) == set(map(name, (ROOT/"kdcode").glob("*.py")))


def test_notebooks_are_clean(copy):
    nbdev("nbdev_clean", copy)
    assert differing(copy, "nbs", "*.ipynb") == []


def test_readme_is_made_from_the_index(tmp_path):
    recipe = next(line for line in (ROOT/"Makefile").read_text().splitlines() if "nbconvert" in line)
    command = recipe.strip().replace("$(BIN)", str(BIN)).replace("$(README)", str(tmp_path/"README.md"))
    subprocess.run(command, shell=True, cwd=ROOT, check=True)
    text = (ROOT/"README.md").read_text()
    assert (tmp_path/"README.md").read_text() == text
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", text): assert (ROOT/link).exists(), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_healthy(path):
    notebook = json.loads(path.read_text())
    kernel = notebook["metadata"]["kernelspec"]
    assert (kernel["name"], kernel["language"]) == ("python3", "python")  # nbdev silently skips any other
    assert "widgets" not in notebook["metadata"]
    first = source(notebook["cells"][0]).splitlines()
    assert notebook["cells"][0]["cell_type"] == "markdown" and first[0].startswith("# ") and first[2].startswith("> ")
    for cell in code_cells(path):
        check_import_cell(cell, path)
        check_collapsed(cell, path)
        for output in cell["outputs"]: check_output(output, path)


def check_import_cell(cell, path):
    """A cell with a top-level import holds only imports, because a docs build executes import cells.

    A cell that sets up the page, or sets an environment variable, before other imports is the exception.
    """
    if "\nset_up_page(" in source(cell) or "os.environ" in source(cell) and "import os" in source(cell): return
    statements = ast.parse(source(cell)).body
    body = [node for node in statements if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
    assert all(imports) or not any(imports), f"{path.name}: {source(cell)[:80]}"


def is_hidden(cell):
    """Whether the site leaves the cell out: set-up and tests that are not part of what the page explains."""
    directives = re.match(r"(#\|.*\n?)*", source(cell))[0].splitlines()
    return "#| hide" in directives or any(line.startswith("#| default_exp") for line in directives)


def check_collapsed(cell, path):
    """JupyterLab collapses exactly the cells that the site hides (View > Collapse Selected Code)."""
    expected = {"jupyter": {"source_hidden": True}} if is_hidden(cell) else {}
    assert cell["metadata"] == expected, f"{path.name}: {source(cell)[:80]}"


def check_output(output, path):
    data = output.get("data", {})
    texts = ["".join(value) for kind, value in data.items() if kind.startswith("text/")]
    text = "".join(output.get("text", "")) + "".join(texts)
    assert output["output_type"] != "error", path.name
    assert "application/vnd.jupyter.widget-view+json" not in data, path.name
    unwanted = re.search(r"it/s\]|Warning|(?<![\w.])/(home|root|tmp|work|Users)/", text)
    assert not unwanted, f"{path.name}: {text[:200]}"


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem[:2].isdigit()], ids=lambda path: path.stem)
def test_module_notebook_has_outputs_and_tests(path):
    code = code_cells(path)
    exported = [cell for cell in code if source(cell).startswith("#| export")]
    tests = [cell for cell in code if "test_" in source(cell) or "assert " in source(cell)]
    assert any(cell["outputs"] for cell in code)
    assert len(tests) >= len(exported) / 3
    counts = [cell["execution_count"] for cell in code if source(cell).strip()]
    assert all(counts) or not any(counts)


# Vocabulary and density

RETIRED_WORDS = re.compile(
    r"(?<![\w`/.-])(?:(?<!scaling )(?<!power )laws?|judge[sd]?|likeliest|lump(?:s|ed)?|twins?|anatomy|sooner"
    r"|dear(?:er|ly)?|beginnings|unrolled|newcomers?|few rows|our loop|in turns|free token|people's code"
    r"|reading student|texts at once|look-ups?|as many as may)(?![\w-])", re.IGNORECASE)
RETIRED_NAMES = {
    "Law", "SparseLaw", "ReadingStudent", "Round", "Ends", "Pace", "Times", "Adaptive", "Index", "Batcher", "Borrowed",
    "Passes", "law", "laws", "room", "judge", "judged", "twin", "few_rows", "anatomy", "pace", "beginnings", "unrolled",
    "likeliest", "lumped", "newcomer", "newcomers", "texts_at_once", "dialect", "reads", "place", "places"}
TEXT_FILES = ("*.md", "Makefile", "kdcode/*.html", "docs/*.*", "tests/*.py", "models/*/README.md", "onyxia/*.*",
              "configs/**/*.yaml", "results/**/report.md")
TEXTS = [*NOTEBOOKS, *sorted(path for pattern in TEXT_FILES for path in ROOT.glob(pattern))]


def retired(text): return [match[0] for match in RETIRED_WORDS.finditer(text)]


def readable_text(path):
    """The text that people read in a file: of a notebook its cells, not its outputs."""
    return "\n".join(map(source, cells(path))) if path.suffix == ".ipynb" else path.read_text()


@pytest.mark.parametrize("path", [path for path in TEXTS if path.name != Path(__file__).name], ids=name)
def test_no_retired_words(path):
    assert retired(readable_text(path)) == []


@pytest.mark.parametrize("path", sorted((ROOT/"kdcode").glob("*.py")), ids=name)
def test_no_retired_identifiers(path):
    with path.open() as file: tokens = list(tokenize.generate_tokens(file.readline))
    assert {token.string for token in tokens if token.type == tokenize.NAME} & RETIRED_NAMES == set()


def test_retired_words_are_found():
    """The control of the two tests above."""
    assert retired("The law is the teacher's; it is judged sooner. In turns, our loop looks: look-up.") == [
        "law", "judged", "sooner", "In turns", "our loop", "look-up"]
    assert retired("A scaling law, a power law, `law`, outlaw, twin-lens") == []
    tokens = tokenize.generate_tokens(io.StringIO("room = law").readline)
    assert {token.string for token in tokens} >= {"room", "law"} <= RETIRED_NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exported_cells_are_short(path):
    exported = [source(cell) for cell in code_cells(path) if source(cell).startswith("#| export")]
    assert [len(text.splitlines()) for text in exported if len(text.splitlines()) > 40] == []


# Settings, paths, pins

PUBLIC = ("kdcode/*.py", "configs/*.yaml", "Makefile", "README.md")
PUBLIC_FILES = [path for pattern in PUBLIC for path in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("path", PUBLIC_FILES, ids=name)
def test_no_absolute_path_and_no_secret(path):
    text = path.read_text()
    assert not re.search(r"""["'\s(=](/(home|root|tmp|work|usr|opt|Users)/|[A-Z]:\\\\)""", text)
    assert not re.search(r"hf_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{12,}", text)


def test_named_configurations_are_valid():
    from kdcode.config import Config, check_search_space, load_config, read_experiment, read_yaml
    names = {path.stem: load_config(path).name for path in (ROOT/"configs").glob("*.yaml")}
    names |= {path.stem: read_experiment(path).config.name for path in (ROOT/"configs"/"experiments").glob("*.yaml")}
    assert len(names) > 3 and all(stem == configured for stem, configured in names.items())
    for path in (ROOT/"configs"/"tuning").glob("*.yaml"): check_search_space(read_yaml(path), Config())


def test_settings_agree_with_pyproject():
    project, nbdev3 = PROJECT["project"], PROJECT["tool"]["nbdev"]
    assert (SETTINGS["lib_name"], SETTINGS["description"]) == (project["name"], project["description"])
    assert project["requires-python"] == f">={SETTINGS['min_python']}"
    assert project["keywords"] == SETTINGS["keywords"].split()
    assert SETTINGS["version"] == importlib.metadata.version("kdcode")
    for key, value in nbdev3.items(): assert SETTINGS[key] == str(value), key


def test_constraints_pin_every_requirement():
    lines = [line for line in (ROOT/"constraints.txt").read_text().splitlines() if "==" in line]
    pins = {canonicalize_name(line.split("==")[0]): line for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    parts = [part for name, part in extras.items() if name != "assistant"]  # has an environment of its own
    for text in PROJECT["project"]["dependencies"] + [text for part in parts for text in part]:
        requirement = Requirement(text)
        if requirement.name == "kdcode": continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{text} has no pin"
        assert requirement.specifier.contains(pin.split("==")[1]), f"{text} and {pin}"
    assert {"torch==2.13.0", "nbdev==2.4.14"} <= set(pins.values())


def installed_requirements(package):
    """Everything that `pip install PACKAGE` brings."""
    needed, seen = [package], set()
    while needed:
        current = canonicalize_name(needed.pop())
        if current in seen: continue
        seen.add(current)
        try: requirements = map(Requirement, importlib.metadata.requires(current) or [])
        except importlib.metadata.PackageNotFoundError: continue
        needed += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return seen


def git(*words, folder):
    names = {f"GIT_{role}_{field}": "x" for role in ("AUTHOR", "COMMITTER") for field in ("NAME", "EMAIL")}
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["git", *words], cwd=folder, env=os.environ | names | path, check=True, capture_output=True)


def add_function(file, name, first):
    """Add an exported function after the first exported cell of a notebook, or at the end."""
    notebook = json.loads(file.read_text())
    exported = [i for i, cell in enumerate(notebook["cells"]) if source(cell).startswith("#| export")]
    cell = {"cell_type": "code", "id": name, "metadata": {}, "execution_count": None, "outputs": [],
            "source": ["#| export\n", f"def {name}(): pass"]}
    notebook["cells"].insert(exported[1] if first else len(notebook["cells"]), cell)
    file.write_text(json.dumps(notebook, indent=1) + "\n")


def test_merge_of_two_exports_has_no_conflict(tmp_path):
    """Both branches add a function to one notebook: the notebook merges, and the library is exported again."""
    (tmp_path/"nbs").mkdir()
    notebook = tmp_path/"nbs"/"00_provenance.ipynb"
    for file in (".gitattributes", ".gitconfig", "settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT/file, tmp_path/file)
    shutil.copy(ROOT/"nbs"/notebook.name, notebook)
    git("init", folder=tmp_path)
    git("config", "include.path", "../.gitconfig", folder=tmp_path)
    hooks = subprocess.run(["make", "-n", "hooks"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for command in hooks:
        if command.startswith("git config "): git(*shlex.split(command)[1:], folder=tmp_path)
    for branch, start in (("start", None), ("first", "start"), ("last", "start")):
        if start: git("checkout", "-b", branch, start, folder=tmp_path)
        if start: add_function(notebook, f"{branch}_function", branch == "first")
        nbdev("nbdev_export", tmp_path)
        git("add", ".", folder=tmp_path)
        git("commit", "-m", branch, folder=tmp_path)
        if not start: git("branch", "-m", "start", folder=tmp_path)
    git("merge", "--no-edit", "first", folder=tmp_path)  # fails if there is a conflict
    nbdev("nbdev_export", tmp_path)
    for file in ("provenance.py", "_modidx.py"):
        text = (tmp_path/"kdcode"/file).read_text()
        assert "first_function" in text and "last_function" in text


def test_library_requires_neither_nbdev_nor_fastcore():
    """That all modules can be imported without is tested in test_display.py."""
    seen = installed_requirements("kdcode")
    assert {"torch", "transformers"} <= seen and not {"nbdev", "fastcore", "execnb", "ghapi"} & seen


def test_no_pickled_weights():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    tracked = listed or [path.name for path in ROOT.rglob("*")]
    assert not [file for file in tracked if file.endswith((".pt", ".pth", ".bin", ".pkl", ".ckpt"))]
    assert "trust_remote_code" not in "".join(path.read_text() for path in (ROOT/"kdcode").glob("*.py"))


# Static checks

@pytest.mark.parametrize("words", [("ruff", "check"), pytest.param(("mypy",), marks=pytest.mark.slow)],
                         ids=lambda words: words[0])
def test_static_checks_find_nothing(words):
    """The programs of `make check`; `make setup` installs both, so a missing one is a failure."""
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT/"Makefile").read_text(), re.M)[1]
    assert " ".join(["$(BIN)/" + words[0], *words[1:]]) in [line.strip() for line in recipe.splitlines()]
    done = subprocess.run([BIN/words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


SPOILT = f"""import math

undefined(1)
1 == 2

def half(x: int) -> float: return x / 2

half(1, 2)
math.sqrt('a')
math.nothing
long = "{'x' * 120}"
"""


@pytest.mark.parametrize("words, codes", [
    (("ruff", "check"), ("F821", "B015", "E501")), (("mypy",), ("arg-type", "attr-defined", "call-arg"))],
    ids=["ruff", "mypy"])
def test_static_checks_find_mistakes(tmp_path, words, codes):
    """The control of the test above, with the same settings."""
    shutil.copy(ROOT/"pyproject.toml", tmp_path)
    for folder in ("kdcode", "tests"):
        (tmp_path/folder).mkdir()
        (tmp_path/folder/"spoilt.py").write_text(SPOILT)
    done = subprocess.run([BIN/words[0], *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and all(code in done.stdout for code in codes), done.stdout + done.stderr


# GitHub, hooks, commands

def read(path): return yaml.safe_load((ROOT/path).read_text())


WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.y*ml"))
FORMS = sorted(path for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if path.name != "config.yml")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT/"Makefile").read_text(), re.M))


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_workflow_is_sound(path):
    workflow = read(path)
    assert workflow["name"] and workflow[True]  # YAML reads the key `on` as true
    assert workflow["permissions"]  # only the rights that are named
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", step.get("uses", "a/b@v1")), step
            assert set(re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))) <= TARGETS, step


def test_tests_run_on_every_supported_python():
    matrix = read(".github/workflows/test.yaml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert matrix == ["3.11", "3.12", "3.13"] and matrix[0] == SETTINGS["min_python"]


@pytest.mark.parametrize("path", FORMS, ids=name)
def test_issue_form_is_sound(path):
    """The keys that GitHub requires, and only options, files and fields that this project has."""
    from kdcode.config import Config
    form = read(path)
    assert form["name"] and form["description"] and form["labels"]
    inputs = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in inputs} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({part["id"] for part in inputs}) == len(inputs) and all(part["attributes"]["label"] for part in inputs)
    assert any(part.get("validations", {}).get("required") for part in inputs)
    for options in (part["attributes"]["options"] for part in inputs if part["type"] == "dropdown"):
        assert len(set(options)) == len(options) > 1
    for section, field in re.findall(r"`(?:--)?([a-z]+)\.([a-z_]+)\b[^`]*`", path.read_text()):
        file = field in ("json", "md") and section in ("run", "report")
        assert file or hasattr(getattr(Config(), section), field), (section, field)


def test_citation_is_sound():
    citation, project = read("CITATION.cff"), PROJECT["project"]
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["message"]
    described = (citation["title"], citation["version"], citation["abstract"])
    assert described == (SETTINGS["lib_name"], SETTINGS["version"], SETTINGS["description"])
    published = (citation["license"], citation["repository-code"], citation["keywords"])
    assert published == (project["license"], SETTINGS["git_url"], project["keywords"])
    assert citation["authors"] == [{"name": SETTINGS["author"]}]
    for paper in citation["references"]:
        assert paper["title"] and paper["authors"] and 2000 < paper["year"] < 2030 and paper["url"].startswith("https://")


def test_hooks_use_this_environment():
    """Each hook names a program that `make setup` installs, and files that exist."""
    repositories = read(".pre-commit-config.yaml")["repos"]
    hooks = [hook for repository in repositories for hook in repository["hooks"] if repository["repo"] == "local"]
    tracked = [path.relative_to(ROOT).as_posix() for folder in ("nbs", "kdcode") for path in (ROOT/folder).rglob("*.*")]
    assert {hook["id"] for hook in hooks} == {"clean", "export", "readme", "ruff"}
    for hook in hooks:
        program, *words = hook["entry"].split()
        if program.startswith(".venv/bin/"): assert (BIN/Path(program).name).exists(), hook
        else: assert program == "make" and set(words) - {"--silent"} <= TARGETS, hook
        assert hook["language"] == "system", hook
        assert "types_or" in hook or any(re.search(hook["files"], file) for file in [*tracked, "README.md"]), hook


def commands_to_copy() -> list[str]:
    """The `kdcode` commands in shell blocks of the README and the docs, and in comments of configurations."""
    pages = [ROOT/"README.md", ROOT/"CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("models/*/README.md")]
    blocks = [re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE) for page in pages]
    lines = [line for found in blocks for block in found for line in block.splitlines()]
    configured = [line for file in ROOT.glob("configs/**/*.yaml") for line in file.read_text().splitlines()]
    lines += [line.lstrip("# ") for line in configured if re.match("# +kdcode ", line)]
    return sorted({match[1] for line in lines if (match := re.match(r"(?:\.venv/bin/)?kdcode (.+)", line))})


@pytest.mark.parametrize("command", commands_to_copy())
def test_command_to_copy_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command, comments=True)
    if arguments[-1] in ("--help", "--help-all"): arguments.pop()
    parse(arguments)
