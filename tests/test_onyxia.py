"""The init script in a folder that imitates an Onyxia pod, and the launch links parsed as Onyxia's launcher does."""
import configparser
import fcntl
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT/"onyxia"))
import launch  # noqa: E402
import packages  # noqa: E402

PARSER = configparser.ConfigParser()
PARSER.read(ROOT/"settings.ini")
SETTINGS = PARSER["DEFAULT"]
SCRIPT = (ROOT/"onyxia"/"init.sh").read_text()
FIRST_LESSON = min((ROOT/"nbs"/"tutorials").glob("*.ipynb")).relative_to(ROOT).as_posix()


def link_or_copy(source, target):
    try: os.link(source, target)
    except OSError: shutil.copy2(source, target)


UNNEEDED = ("site-packages", "dist-packages", "test", "config-*", "idlelib", "tkinter", "turtledemo")


def make_image(folder):
    """Create the image's /opt/python: this Python with all installed packages except this project."""
    version, library = f"python{sys.version_info.major}.{sys.version_info.minor}", Path(sysconfig.get_path("stdlib"))
    shutil.copytree(library, folder/"lib"/version, ignore=shutil.ignore_patterns(*UNNEEDED), copy_function=link_or_copy)
    for shared in Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3*.so*"):
        link_or_copy(shared, folder/"lib"/shared.name)
    (folder/"bin").mkdir()
    shutil.copy2(os.path.realpath(sys._base_executable), folder/"bin"/version)
    for name in ("python3", "python"): (folder/"bin"/name).symlink_to(version)
    link_packages(site_packages_of(folder))


def site_packages_of(image):
    command = [image/"bin"/"python3", "-c", "import site; print(site.getsitepackages()[-1])"]
    environment = {"LD_LIBRARY_PATH": str(image/"lib")}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def link_packages(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "kdcode" not in package.name and package.name != "__pycache__": (folder/package.name).symlink_to(package)


def make_wheel(folder):
    """Create a wheel of setuptools, the only package that pip must find: it builds the project."""
    package = distribution("setuptools")
    folder.mkdir()
    with zipfile.ZipFile(folder/f"setuptools-{package.version}-py3-none-any.whl", "w") as wheel:
        for file in package.files or []:
            if file.parts[0] != ".." and "__pycache__" not in file.parts: wheel.write(file.locate(), file.as_posix())


def make_repository(folder):
    """Create the repository for git.repository: this project with the lessons, as a git bundle."""
    (source := folder/"source").mkdir()
    for name in ("settings.ini", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT/name, source)
    ignored = shutil.ignore_patterns("__pycache__", "_proc", ".ipynb_checkpoints", "experiments")
    for name in ("kdcode", "onyxia", "nbs"): shutil.copytree(ROOT/name, source/name, ignore=ignored)
    bundle, author = folder/"kdcode.bundle", ["-c", "user.name=a person", "-c", "user.email=person@example.org"]
    for words in (["init", "--quiet", "--initial-branch", "main"], ["add", "."],
                  [*author, "commit", "--quiet", "--message", "all"],
                  ["bundle", "create", "--quiet", bundle, "HEAD", "main"]):
        subprocess.run(["git", *words], cwd=source, check=True, capture_output=True)
    return bundle


def pod_user():
    """Return the user of the pod: the current user, or another one if the tests run as root."""
    if os.geteuid(): return pwd.getpwuid(os.geteuid())
    users = sorted(pwd.getpwall(), key=lambda user: user.pw_uid)
    return next((user for user in users if 1000 <= user.pw_uid < 60000), None)


JUPYTER_CONFIG = ["# Configuration file for jupyter-server.", "c = get_config()", "c.ServerApp.allow_origin = 'here'"]


class Pod:
    """An image, a user, a home folder of which only ~/work is persistent, and Onyxia's environment variables."""

    def __init__(self, folder, image, repository):
        self.home, self.image, self.repository = folder/"home"/"onyxia", image, repository
        self.user, self.wheels = pod_user(), repository.parent/"wheels"
        self.work, self.config = self.home/"work", self.home/".jupyter"/"jupyter_server_config.py"
        self.checkout = self.work/"kdcode"
        self.venv = self.checkout/".venv"
        self.start()

    def start(self):
        """Set up the home folder as it is before the script runs: the image's files, and what ~/work contains."""
        self.work.mkdir(parents=True, exist_ok=True)
        for path in self.home.iterdir():
            if path != self.work: shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.config.parent.mkdir()
        self.config.write_text("\n".join(JUPYTER_CONFIG))  # without a newline at the end
        bashrc = self.home/".bashrc"
        bashrc.write_text("alias ll='ls -l'\n")
        for path in (self.home, self.work, self.config.parent, self.config, bashrc):
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    @property
    def environment(self):
        """Environment variables of the pod. pip may not download anything."""
        path, library = f"{self.image/'bin'}:/usr/local/bin:/usr/bin:/bin", str(self.image/"lib")
        return {"HOME": str(self.home), "WORKSPACE_DIR": str(self.work), "USERNAME": self.user.pw_name, "PATH": path,
                "LD_LIBRARY_PATH": library, "LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}

    def run(self, *command, root=False, stdin="", check=True, timeout=300, **variables):
        """Run a command in the pod, as its user or as root."""
        user = {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}
        if root or os.geteuid(): user = {}
        return subprocess.run(list(map(str, command)), input=stdin, cwd=self.home, env=self.environment | variables,
                              capture_output=True, text=True, check=check, timeout=timeout, **user)

    def init(self, *words, script=SCRIPT, **options):
        """Run the script as Onyxia does: curl URL | bash -s -- ARGUMENTS."""
        done = self.run("bash", "-s", "--", *words, stdin=script, check=False, **options)
        assert done.returncode == 0, done.stderr  # otherwise Jupyter would not start
        return done

    def clone(self, root=False):
        """Clone git.repository into ~/work, as Onyxia does before it runs the script."""
        self.run("git", "clone", "--quiet", self.repository, self.checkout, root=root)

    def foreign(self):
        """Return the files in the home folder that another user owns."""
        return [path for path in self.home.rglob("*") if path.lstat().st_uid != self.user.pw_uid]

    def kernel(self, name):
        folder = self.home/".local"/"share"/"jupyter"/"kernels"/name
        return json.loads((folder/"kernel.json").read_text())


@pytest.fixture(scope="module")
def shared():
    """A folder that every user can enter (pytest's temporary folders are private)."""
    if pod_user() is None: pytest.skip("the tests run as root, and there is no other user")
    with tempfile.TemporaryDirectory(prefix="onyxia-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def image(shared):
    make_image(shared/"opt"/"python")
    make_wheel(shared/"wheels")
    return shared/"opt"/"python"


@pytest.fixture(scope="module")
def repository(shared): return make_repository(shared)


@pytest.fixture
def pod(shared, image, repository):
    folder = Path(tempfile.mkdtemp(dir=shared))
    os.chmod(folder, 0o755)
    yield Pod(folder, image, repository)
    shutil.rmtree(folder)


def assert_ready(pod, notebook=FIRST_LESSON):
    """Assert everything that the script sets up: environment, kernels, Jupyter, terminal, owners."""
    assert_environment(pod)
    for name in ("kdcode", "python3"): assert_kernel(pod, name)
    lines = pod.config.read_text().splitlines()
    assert lines[:3] == JUPYTER_CONFIG
    assert [line.split("  #")[0] for line in lines[3:]] == [f"c.LabApp.default_url = '/lab/tree/kdcode/{notebook}'"]
    bashrc = (pod.home/".bashrc").read_text()
    assert bashrc.startswith("alias ll='ls -l'\n. ") and bashrc.count("environment.sh") == 1
    assert pod.foreign() == []


def assert_environment(pod):
    assert (pod.venv/"complete").exists()
    assert "include-system-site-packages = true" in (pod.venv/"pyvenv.cfg").read_text()
    own = {path.name.split("-")[0].lower() for path in pod.venv.glob("lib/*/site-packages/*.dist-info")}
    assert "kdcode" in own and "torch" not in own  # torch is the image's


def assert_kernel(pod, name):
    kernel = pod.kernel(name)
    assert kernel["argv"][0] == str(pod.venv/"bin"/"python") and kernel["language"] == "python"
    caches = ("HF_HOME", "PIP_CACHE_DIR", "MPLCONFIGDIR", "TORCH_HOME", "XDG_CACHE_HOME")
    assert all(kernel["env"][key].startswith(str(pod.work)) for key in caches)
    assert kernel["env"]["KDCODE_HOME"] == str(pod.checkout)


@pytest.mark.slow
def test_init_runs_again_and_after_a_restart(pod):
    pod.clone(root=True)  # as Onyxia does when it is root
    first = pod.init(root=True)
    assert "installing" in first.stdout and "kdcode: ready" in first.stdout and first.stderr == "", first.stderr
    assert_ready(pod)
    created = (pod.venv/"complete").stat().st_mtime_ns
    again = pod.init("nbs/index.ipynb")
    assert "installing" not in again.stdout and again.stderr == ""
    assert_ready(pod, "nbs/index.ipynb")
    pod.start()  # a restart: everything outside ~/work is lost
    after = pod.init()
    assert "installing" not in after.stdout and after.stderr == ""
    assert_ready(pod)
    assert (pod.venv/"complete").stat().st_mtime_ns == created
    assert_notebook_runs(pod)
    assert_terminal_works(pod)
    assert_jupyter_opens_the_lesson(pod)


PRINT_PATHS = """import os, sys, matplotlib, kdcode
print(sys.prefix, kdcode.__file__, os.environ['HF_HOME'], matplotlib.get_cachedir(), sep='\\n')"""


def assert_notebook_runs(pod):
    """Run a notebook in the kernel that the notebooks name, with the image's Jupyter."""
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None,
            "source": PRINT_PATHS}
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    notebook = {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    done = pod.run("python3", "-m", "nbconvert", "--log-level", "ERROR", "--to", "notebook", "--execute", "--stdin",
                   "--stdout", stdin=json.dumps(notebook))
    text = "".join(json.loads(done.stdout)["cells"][0]["outputs"][0]["text"])
    cache = pod.work/".cache"
    expected = [pod.venv, pod.checkout/"kdcode"/"__init__.py", cache/"huggingface", cache/"matplotlib"]
    assert text.splitlines() == list(map(str, expected))


def assert_terminal_works(pod):
    """The command is on the PATH once, also if .bashrc is read twice, and caches are in ~/work."""
    commands = "command -v kdcode; echo $PIP_CACHE_DIR; . ~/.bashrc; echo $PATH"
    shell = pod.run("bash", "--rcfile", pod.home/".bashrc", "-i", "-c", commands)
    command, cache, path = shell.stdout.splitlines()
    assert (command, cache) == (str(pod.venv/"bin"/"kdcode"), str(pod.work/".cache"/"pip"))
    assert path.count(".venv") == 1


PRINT_JUPYTER = """import sys
from jupyterlab.labapp import LabApp
from jupyter_client.kernelspec import KernelSpecManager
app = LabApp()
app.config_file_name = "jupyter_server_config"
app.load_config_file()
print(app.config.LabApp.default_url)
kernels = sorted(KernelSpecManager().get_all_specs().items())
print(*(f"{name}: {found['spec']['display_name']}" for name, found in kernels), sep=", ")"""


def assert_jupyter_opens_the_lesson(pod):
    """The image's Jupyter opens the first lesson and offers the two kernels."""
    url, kernels = pod.run("python3", "-c", PRINT_JUPYTER).stdout.splitlines()
    assert url == f"/lab/tree/kdcode/{FIRST_LESSON}" and (pod.work/url.removeprefix("/lab/tree/")).exists()
    assert kernels == "kdcode: Python 3 (kdcode), python3: Python 3 (kdcode)"


# Python until it makes an environment. There the time is over (SIGALRM for `timeout`, the leader of the process group),
# and the environment is as venv leaves it if it is interrupted after pip and before the image's packages.
INTERRUPTED_PYTHON = """#!/bin/bash
if [ "$2" = venv ]; then
    python3 -m venv "${@: -1}"
    kill -ALRM "$(cut -d ' ' -f 5 /proc/$$/stat)"
    sleep 600
fi
exec python3 "$@"
"""


@pytest.mark.slow
def test_interrupted_init_is_repaired(pod):
    python = pod.home.parent/"python"
    python.write_text(INTERRUPTED_PYTHON)
    python.chmod(0o755)
    interrupted = pod.init(KDCODE_REPOSITORY=str(pod.repository), KDCODE_PYTHON=str(python))
    assert "not finished after" in interrupted.stderr, interrupted
    assert f"bash {pod.checkout}/onyxia/init.sh" in interrupted.stderr, interrupted
    assert not (pod.venv/"complete").exists(), interrupted
    finished = pod.init("nbs/nowhere.ipynb", KDCODE_REPOSITORY=str(pod.repository))
    assert finished.stderr == (f"kdcode: there is no notebook nbs/nowhere.ipynb in {pod.checkout}; "
                               "Jupyter opens the first lesson instead\n")
    assert_ready(pod)
    remove_python_and_kdcode(pod)
    repaired = pod.init()
    assert "installing" in repaired.stdout and repaired.stderr == ""
    assert_ready(pod)
    assert_conflict_is_reported(pod)


FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"-m pip"*) test -e pip ;;
    *"-m venv"*) touch pip ;;
esac
"""


def test_interrupted_make_setup_is_repaired(tmp_path):
    """venv makes Python first and installs pip later."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"): shutil.copy(ROOT/name, tmp_path)
    (python := tmp_path/".venv"/"bin"/"python").parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path/".venv"/"complete").exists(), done.stderr


def assert_conflict_is_reported(pod):
    """pip cannot satisfy the constraints: the message has pip's error and names the log."""
    (pod.venv/"complete").unlink()
    with open(pod.checkout/"constraints.txt", "a") as pins: pins.write("optuna==0.0.1\n")
    failed = pod.init()
    log = pod.work/".cache"/"kdcode"/"init.log"
    assert failed.stderr.splitlines() == [
        f"kdcode: failed to install the packages ({last_error(pod)}); see the log in {log}",
        f"kdcode: to continue, open a terminal and run: bash {pod.checkout}/onyxia/init.sh"]
    assert not (pod.venv/"complete").exists()


def remove_python_and_kdcode(pod):
    """Simulate an image with another Python, and a lost installation of the project."""
    shutil.rmtree(next(pod.venv.glob("lib/*/site-packages/kdcode-*.dist-info")))
    next(pod.venv.glob("lib/*/site-packages/__editable__*kdcode*.pth")).unlink()
    (pod.venv/"bin"/"python").unlink()


def last_error(pod):
    """Return the last error in the log, which must name the cause."""
    lines = (pod.work/".cache"/"kdcode"/"init.log").read_text().splitlines()
    error = [line for line in lines if re.match("(error|fatal)", line, re.IGNORECASE)][-1]
    assert "ResolutionImpossible" in error or "conflicting" in error
    return error


def test_init_reports_each_problem_in_one_line(pod):
    incomplete = SCRIPT[:len(SCRIPT) * 2 // 3]  # the connection was lost: no part of the script may run
    pod.run("bash", "-s", stdin=incomplete, check=False)
    assert list(pod.work.iterdir()) == []
    failed = pod.init(KDCODE_REPOSITORY="/nowhere.bundle")
    assert "failed to clone https://github.com/kdcode/kdcode (fatal:" in only_message(failed)
    pod.run("mkdir", "-p", pod.checkout/"runs")
    failed = pod.init(KDCODE_REPOSITORY=str(pod.repository))
    assert f"{pod.checkout} exists and is not a complete checkout" in only_message(failed)
    shutil.rmtree(pod.checkout)
    pod.clone()
    assert "there is no python2.0 in " in only_message(pod.init(KDCODE_PYTHON="python2.0"), pod)
    with open(pod.work/".cache"/"kdcode"/"lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "this script is already running" in only_message(pod.init(), pod)
    assert pod.foreign() == []


def make_assistant_wheel(folder):
    """Create a wheel in place of Notebook Intelligence: a package with the same name and version, and no content."""
    name = "notebook_intelligence-6.2.0"
    with zipfile.ZipFile(folder/f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("notebook_intelligence/__init__.py", "")
        about = "Metadata-Version: 2.1\nName: notebook-intelligence\nVersion: 6.2.0\n"
        wheel.writestr(f"{name}.dist-info/METADATA", about)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")


IMPORT_AS_JUPYTER = """import sys
from jupyterlab.labapp import LabApp
app = LabApp()
app.config_file_name = "jupyter_server_config"
app.load_config_file()
import kdcode.assistant, notebook_intelligence
print(kdcode.assistant.__file__, app.config.LabApp.default_url, sys.prefix)"""


@pytest.mark.slow
def test_init_installs_the_assistant(pod):
    """In the image's Python, with its settings in the home folder; the key is in no file."""
    make_assistant_wheel(pod.wheels)
    for folder in (pod.image, pod.image/"bin", site_packages_of(pod.image)):  # the image's files belong to its user
        os.chown(folder, pod.user.pw_uid, pod.user.pw_gid)
    variables = {"KDCODE_REPOSITORY": str(pod.repository), "KDCODE_API_KEY": "unusual-key-of-a-test"}
    first = pod.init("--with-assistant=https://user-1.example.org", "nbs/index.ipynb", **variables)
    assert first.stderr == "" and "kdcode serve at https://user-1.example.org" in first.stdout
    again = pod.init("--with-assistant", **variables)
    assert again.stderr == "" and "http://127.0.0.1:8000" in again.stdout
    assert pod.config.read_text().count("sys.path.append") == 1
    assert_assistant(pod)
    failed = pod.init("--with-assistant=here", **variables)
    assert failed.stderr.splitlines() == [
        "kdcode: failed to install the assistant (kdcode.assistant: the address is 'here'; give that of kdcode serve, "
        f"such as http://127.0.0.1:8000/v1); see the log in {pod.work}/.cache/kdcode/init.log",
        f"kdcode: to continue, open a terminal and run: bash {pod.checkout}/onyxia/init.sh --with-assistant=here"]
    unknown = pod.init("--with-tea", **variables)
    assert "kdcode: ready" in unknown.stdout and unknown.stderr == (
        "kdcode: there is no option --with-tea; this script takes --with-assistant[=SERVER] and a notebook\n")


def assert_assistant(pod):
    """The image's Jupyter finds the assistant, which asks the server on this machine."""
    file, url, prefix = pod.run("python3", "-c", IMPORT_AS_JUPYTER).stdout.split()
    assert (file, url) == (f"{pod.checkout}/kdcode/assistant.py", f"/lab/tree/kdcode/{FIRST_LESSON}")
    assert (Path(prefix)/"share"/"jupyter"/"nbi_extensions"/"kdcode"/"extension.json").exists()
    settings = json.loads((pod.home/".jupyter"/"nbi"/"config.json").read_text())
    for role in ("chat_model", "inline_completion_model"):
        assert settings[role]["properties"] == [{"id": "base_url", "value": "http://127.0.0.1:8000/v1"}]
    done = pod.run("grep", "--recursive", "--files-with-matches", "unusual-key-of-a-test", ".", check=False)
    assert done.stdout == "" and pod.foreign() == []


def only_message(done, pod=None):
    """Return the one line that reports a problem. With a checkout, a second line says how to continue."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 + (pod is not None), done.stderr
    assert all(line.startswith("kdcode: ") for line in lines) and "ready" not in done.stdout, done.stderr
    if pod is not None:
        assert lines[1] == f"kdcode: to continue, open a terminal and run: bash {pod.checkout}/onyxia/init.sh"
    return lines[0]


class Package:
    """An installed package, with the attributes that `packages` uses."""

    def __init__(self, version, *requires):
        self.version, self.requires = version, list(requires)


def test_constraints_follow_the_torch_of_the_image(monkeypatch):
    lines = (ROOT/"constraints.txt").read_text().splitlines()
    torch = Package("2.12.0+cu130", "sympy==1.13.1", "Jinja2", "networkx>=99; python_version < '3'",
                    "typing-extensions>=99")
    monkeypatch.setattr(packages, "installed", lambda name: torch)
    pins = packages.constraints()
    names = {pin.split("==")[0] for pin in pins}
    assert "torch==2.12.0+cu130" in pins and {"Jinja2", "networkx"} <= names
    left_out = [line.split("==")[0] for line in lines if "==" in line and line not in pins]
    assert left_out == ["sympy", "torch", "typing_extensions"]
    for package in (Package("2.1.0"), None):  # too old, or not installed: torch is installed with the rest
        monkeypatch.setattr(packages, "installed", lambda name: package)
        assert packages.constraints() == lines


def test_missing_packages_are_found(monkeypatch, tmp_path):
    installed = packages.installed
    is_here = Path(find_spec("kdcode").origin).parent.parent == ROOT
    assert packages.missing({"dev"}) == ([] if is_here else ["kdcode"])
    replaced = {"optuna": None, "s3fs": Package("2020.1", "fsspec>=9999"), "colorlog": None, "torch": Package("2.1.0")}
    monkeypatch.setattr(packages, "installed", lambda name: replaced[name] if name in replaced else installed(name))
    missing = packages.missing({"dev"})
    assert {"optuna>=5", "fsspec>=9999", "torch>=2.10"} <= set(missing)
    assert "colorlog" not in missing  # only optuna, which is not installed, requires it
    monkeypatch.setattr(packages, "ROOT", tmp_path)  # the checkout was moved
    shutil.copy(ROOT/"pyproject.toml", tmp_path)
    missing = packages.missing(set())
    assert "kdcode" in missing and not any(name.startswith(("s3fs", "nbdev")) for name in missing)


def test_script_passes_static_checks():
    assert f"readonly REPOSITORY={SETTINGS['git_url']}  #" in SCRIPT
    extras = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"readonly ASSISTANT='{extras['assistant'][-1]}'  " in SCRIPT
    assert os.access(ROOT/"onyxia"/"init.sh", os.X_OK)
    subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None: pytest.skip("shellcheck is not installed")
    done = subprocess.run([checker, ROOT/"onyxia"/"init.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


LAUNCHER = "https://datalab.sspcloud.fr/launcher/"


def parse_link(link):
    """Parse a link as Onyxia's launcher does: the chart, other parameters, and chart values by their path.

    A key with a dot is a chart value: true, false, null, a number, or a string between « and ».
    """
    address, _, query = link.partition("?")
    pairs = [part.split("=") for part in query.split("&")]
    assert address.startswith(LAUNCHER)
    assert all(len(pair) == 2 for pair in pairs)  # = and & inside a value are encoded
    others = {key: value for key, value in pairs if "." not in key}
    values = {tuple(key.split(".")): chart_value(value) for key, value in pairs if "." in key}
    return address.removeprefix(LAUNCHER), others, values


def chart_value(text):
    if text in ("true", "false", "null"): return json.loads(text)
    if re.match(r"[+-]?\.?\d", text): return float(text)
    assert text.isascii(), text
    return re.fullmatch("«([^»]*)»", unquote(text, errors="strict"))[1]


def test_launch_links_contain_the_settings():
    raw = SETTINGS["git_url"].replace("github.com", "raw.githubusercontent.com")
    script = f"{raw}/{SETTINGS['branch']}/onyxia/init.sh"  # no redirect, which Onyxia would not follow
    for image in ("jupyter-pytorch-gpu", "jupyter-pytorch"):
        chart, others, values = parse_link(launch.launch_link(image))
        assert (chart, others) == (f"ide/{image}", {"autoLaunch": "true", "name": "kdcode"})
        assert values == {("git", "repository"): SETTINGS["git_url"], ("init", "personalInit"): script}
    _, _, values = parse_link(launch.launch_link("jupyter-pytorch", FIRST_LESSON, port=True))
    assert (values["init", "personalInitArgs"], values["networking", "user", "enabled"]) == (FIRST_LESSON, True)
    _, _, values = parse_link(launch.launch_link("jupyter-pytorch", FIRST_LESSON, assistant=True))
    assert values["init", "personalInitArgs"] == f"--with-assistant {FIRST_LESSON}"
    assert launch.launch_link("jupyter-pytorch-gpu").startswith(
        f"{LAUNCHER}ide/jupyter-pytorch-gpu?autoLaunch=true&name=kdcode&git.repository=%C2%ABhttps%3A%2F%2F")


@pytest.mark.parametrize("image, notebook, message", [
    ("jupyter-r", None, "no image 'jupyter-r'"), ("jupyter-pytorch", "nbs/none.ipynb", "no notebook 'nbs/none.ipynb'")])
def test_launch_links_need_a_known_image_and_notebook(image, notebook, message):
    with pytest.raises(ValueError, match=message): launch.launch_link(image, notebook)


def test_launch_links_for_other_hosts(monkeypatch, tmp_path):
    url = "https://gitlab.example.org/a/b & c"
    (tmp_path/"settings.ini").write_text(f"[DEFAULT]\ngit_url = {url}/\nbranch = main\n")
    (tmp_path/"two words.ipynb").write_text("{}")
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    _, _, values = parse_link(launch.launch_link("jupyter-pytorch"))
    assert values == {("git", "repository"): url, ("init", "personalInit"): f"{url}/-/raw/main/onyxia/init.sh"}
    with pytest.raises(ValueError, match="contains a space"): launch.launch_link("jupyter-pytorch", "two words.ipynb")


@pytest.mark.parametrize("page", ["README.md", "docs/onyxia.md"])
def test_pages_contain_the_launch_links(page):
    links = re.findall(r"https://datalab\.sspcloud\.fr/launcher/[^\s)>\"]+", (ROOT/page).read_text())
    allowed = {launch.launch_link(image, port=port) for image in launch.IMAGES for port in (False, True)}
    assert {launch.launch_link(image) for image in launch.IMAGES} <= set(links) <= allowed


def test_the_page_on_editors_contains_its_launch_links():
    links = re.findall(r"https://datalab\.sspcloud\.fr/launcher/[^\s)>\"]+", (ROOT/"docs"/"editors.md").read_text())
    assert links == [launch.launch_link(image, assistant=True) for image in launch.IMAGES]
