"""The init script in folders that imitate a pod of Onyxia, and the launch links as its launcher reads them."""
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

SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT/"settings.ini")
SETTINGS = SETTINGS["DEFAULT"]
SCRIPT = (ROOT/"onyxia"/"init.sh").read_text()
LESSON = min((ROOT/"nbs"/"tutorials").glob("*.ipynb")).relative_to(ROOT).as_posix()


def link_or_copy(source, target):
    try: os.link(source, target)
    except OSError: shutil.copy2(source, target)


def make_image(folder):
    """Stands for /opt/python: this Python with everything that is installed here, but for this project."""
    version, library = f"python{sys.version_info.major}.{sys.version_info.minor}", Path(sysconfig.get_path("stdlib"))
    unneeded = shutil.ignore_patterns("site-packages", "dist-packages", "test", "config-*", "idlelib", "tkinter", "turtledemo")
    shutil.copytree(library, folder/"lib"/version, ignore=unneeded, copy_function=link_or_copy)
    for shared in Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3*.so*"): link_or_copy(shared, folder/"lib"/shared.name)
    (folder/"bin").mkdir()
    shutil.copy2(os.path.realpath(sys._base_executable), folder/"bin"/version)
    for name in ("python3", "python"): (folder/"bin"/name).symlink_to(version)
    ask = [folder/"bin"/"python3", "-c", "import site; print(site.getsitepackages()[-1])"]
    place = Path(subprocess.run(ask, env={"LD_LIBRARY_PATH": str(folder/"lib")}, check=True, capture_output=True, text=True).stdout.strip())
    place.mkdir(parents=True, exist_ok=True)
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "kdcode" not in package.name and package.name != "__pycache__": (place/package.name).symlink_to(package)


def make_wheel(folder):
    """The only package that pip must find: setuptools, of which the project is built."""
    package = distribution("setuptools")
    folder.mkdir()
    with zipfile.ZipFile(folder/f"setuptools-{package.version}-py3-none-any.whl", "w") as wheel:
        for file in package.files or []:
            if file.parts[0] != ".." and "__pycache__" not in file.parts: wheel.write(file.locate(), file.as_posix())


def make_repository(folder):
    """What git.repository names: this project with the lessons, as a file that git can clone."""
    (source := folder/"source").mkdir()
    for name in ("settings.ini", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"): shutil.copy(ROOT/name, source)
    for name in ("kdcode", "onyxia", "nbs"): shutil.copytree(ROOT/name, source/name, ignore=shutil.ignore_patterns("__pycache__", "_proc", ".ipynb_checkpoints", "experiments"))
    who = ["-c", "user.name=a person", "-c", "user.email=person@example.org"]
    for words in (["init", "--quiet", "--initial-branch", "main"], ["add", "."], [*who, "commit", "--quiet", "--message", "all"], ["bundle", "create", "--quiet", folder/"kdcode.bundle", "HEAD", "main"]):
        subprocess.run(["git", *words], cwd=source, check=True, capture_output=True)
    return folder/"kdcode.bundle"


def onyxia():
    """The person whom a pod belongs to: where the tests run as root, another user; otherwise oneself."""
    if os.geteuid(): return pwd.getpwuid(os.geteuid())
    return next((user for user in sorted(pwd.getpwall(), key=lambda user: user.pw_uid) if 1000 <= user.pw_uid < 60000), None)


class Pod:
    """An image, a user, a home of which ~/work alone survives, and the environment that Onyxia gives."""

    def __init__(self, place, image, repository):
        self.home, self.image, self.repository, self.user = place/"home"/"onyxia", image, repository, onyxia()
        self.work, self.config = self.home/"work", self.home/".jupyter"/"jupyter_server_config.py"
        self.checkout = self.work/"kdcode"
        self.start()

    def start(self):
        """What is there before the script: the image's home, and in it what is left of work."""
        self.work.mkdir(parents=True, exist_ok=True)
        for path in self.home.iterdir():
            if path != self.work: shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.config.parent.mkdir()
        self.config.write_text("# Configuration file for jupyter-server.\nc = get_config()\nc.ServerApp.allow_origin = 'here'")  # with no end of line
        (self.home/".bashrc").write_text("alias ll='ls -l'\n")
        for path in (self.home, self.work, self.config.parent, self.config, self.home/".bashrc"): os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def run(self, *command, root=False, stdin="", check=True, timeout=300, **variables):
        """A command in the pod, as its user or as root."""
        environment = {"HOME": str(self.home), "WORKSPACE_DIR": str(self.work), "USERNAME": self.user.pw_name, "PATH": f"{self.image/'bin'}:/usr/local/bin:/usr/bin:/bin", "LD_LIBRARY_PATH": str(self.image/"lib"),
                       "LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                       "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.repository.parent/"wheels")}  # nothing may be downloaded
        who = {} if root or os.geteuid() else {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}
        return subprocess.run(list(map(str, command)), input=stdin, cwd=self.home, env=environment | variables, capture_output=True, text=True, check=check, timeout=timeout, **who)

    def init(self, *words, script=SCRIPT, **options):
        """The script as Onyxia runs it: curl URL | bash -s -- ARGUMENTS."""
        done = self.run("bash", "-s", "--", *words, stdin=script, check=False, **options)
        assert done.returncode == 0, done.stderr  # Jupyter must start
        return done

    def clone(self, root=False):
        """What Onyxia does before: it clones git.repository into work."""
        self.run("git", "clone", "--quiet", self.repository, self.checkout, root=root)

    def foreign(self):
        """Files in the home that aren't the user's."""
        return [path for path in self.home.rglob("*") if path.lstat().st_uid != self.user.pw_uid]

    def kernel(self, name): return json.loads((self.home/".local"/"share"/"jupyter"/"kernels"/name/"kernel.json").read_text())


@pytest.fixture(scope="module")
def place():
    """A folder that every user can enter (pytest's own are closed)."""
    if onyxia() is None: pytest.skip("a second user is needed where the tests run as root")
    with tempfile.TemporaryDirectory(prefix="onyxia-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def image(place):
    make_image(place/"opt"/"python")
    make_wheel(place/"wheels")
    return place/"opt"/"python"


@pytest.fixture(scope="module")
def repository(place): return make_repository(place)


@pytest.fixture
def pod(place, image, repository):
    home = Path(tempfile.mkdtemp(dir=place))
    os.chmod(home, 0o755)
    yield Pod(home, image, repository)
    shutil.rmtree(home)


def is_ready(pod, notebook=LESSON):
    """Everything that the script promises."""
    venv = pod.checkout/".venv"
    assert (venv/"complete").exists() and "include-system-site-packages = true" in (venv/"pyvenv.cfg").read_text()
    own = {path.name.split("-")[0].lower() for path in venv.glob("lib/*/site-packages/*.dist-info")}
    assert "kdcode" in own and "torch" not in own  # which the image has
    for name in ("kdcode", "python3"):
        kernel = pod.kernel(name)
        assert kernel["argv"][0] == str(venv/"bin"/"python") and kernel["language"] == "python"
        assert all(kernel["env"][key].startswith(str(pod.work)) for key in ("HF_HOME", "PIP_CACHE_DIR", "MPLCONFIGDIR", "TORCH_HOME", "XDG_CACHE_HOME")) and kernel["env"]["KDCODE_HOME"] == str(pod.checkout)
    lines = pod.config.read_text().splitlines()
    assert lines[:3] == ["# Configuration file for jupyter-server.", "c = get_config()", "c.ServerApp.allow_origin = 'here'"]
    assert [line.split("  #")[0] for line in lines[3:]] == [f"c.LabApp.default_url = '/lab/tree/kdcode/{notebook}'"]
    assert (pod.home/".bashrc").read_text().startswith("alias ll='ls -l'\n. ") and (pod.home/".bashrc").read_text().count("environment.sh") == 1
    assert pod.foreign() == []


def test_init_again_and_after_a_restart(pod):
    pod.clone(root=True)  # as Onyxia does, where it is root
    first = pod.init(root=True)
    assert "installing" in first.stdout and "kdcode: ready" in first.stdout and first.stderr == "", first.stderr
    is_ready(pod)
    made = (pod.checkout/".venv"/"complete").stat().st_mtime_ns
    again = pod.init("nbs/index.ipynb")
    assert "installing" not in again.stdout and again.stderr == ""
    is_ready(pod, "nbs/index.ipynb")
    pod.start()  # all but ~/work is lost
    after = pod.init()
    assert "installing" not in after.stdout and after.stderr == ""
    is_ready(pod)
    assert (pod.checkout/".venv"/"complete").stat().st_mtime_ns == made
    a_notebook_runs(pod)
    a_terminal_has_it(pod)
    jupyter_opens_the_lesson(pod)


def a_notebook_runs(pod):
    """In the kernel that the notebooks ask for, started by the image's Jupyter."""
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None,
            "source": "import os, sys, matplotlib, kdcode\nprint(sys.prefix, kdcode.__file__, os.environ['HF_HOME'], matplotlib.get_cachedir(), sep='\\n')"}
    page = {"cells": [cell], "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
    done = pod.run("python3", "-m", "nbconvert", "--log-level", "ERROR", "--to", "notebook", "--execute", "--stdin", "--stdout", stdin=json.dumps(page))
    text = "".join(json.loads(done.stdout)["cells"][0]["outputs"][0]["text"])
    cache = pod.work/".cache"
    assert text.splitlines() == [str(pod.checkout/".venv"), str(pod.checkout/"kdcode"/"__init__.py"), str(cache/"huggingface"), str(cache/"matplotlib")]


def a_terminal_has_it(pod):
    shell = pod.run("bash", "--rcfile", pod.home/".bashrc", "-i", "-c", "command -v kdcode; echo $PIP_CACHE_DIR; . ~/.bashrc; echo $PATH")
    found, cache, path = shell.stdout.splitlines()
    assert (found, cache) == (str(pod.checkout/".venv"/"bin"/"kdcode"), str(pod.work/".cache"/"pip")) and path.count(".venv") == 1


def jupyter_opens_the_lesson(pod):
    """What a browser is sent to, and the kernels that it is offered, by the image's Jupyter."""
    ask = """import sys; from jupyterlab.labapp import LabApp; from jupyter_client.kernelspec import KernelSpecManager
app = LabApp(); app.config_file_name = "jupyter_server_config"; app.load_config_file(); print(app.config.LabApp.default_url)
print(*(f"{name}: {found['spec']['display_name']}" for name, found in sorted(KernelSpecManager().get_all_specs().items())), sep=", ")"""
    url, kernels = pod.run("python3", "-c", ask).stdout.splitlines()
    assert url == f"/lab/tree/kdcode/{LESSON}" and (pod.work/url.removeprefix("/lab/tree/")).exists()
    assert kernels == "kdcode: Python 3 (kdcode), python3: Python 3 (kdcode)"


def test_init_cut_off_is_repaired(pod):
    cut = pod.init(KDCODE_REPOSITORY=str(pod.repository), KDCODE_INIT_SECONDS="2")
    assert "not finished after" in cut.stderr and f"bash {pod.checkout}/onyxia/init.sh" in cut.stderr and not (pod.checkout/".venv"/"complete").exists(), cut
    whole = pod.init("nbs/nowhere.ipynb", KDCODE_REPOSITORY=str(pod.repository))
    assert whole.stderr == f"kdcode: there is no notebook nbs/nowhere.ipynb in {pod.checkout}; the first lesson opens instead\n"
    is_ready(pod)
    # what it was made of is gone: the image has another Python, and the project's own files were lost
    shutil.rmtree(next((pod.checkout/".venv").glob("lib/*/site-packages/kdcode-*.dist-info")))
    next((pod.checkout/".venv").glob("lib/*/site-packages/__editable__*kdcode*.pth")).unlink()
    (pod.checkout/".venv"/"bin"/"python").unlink()
    repaired = pod.init()
    assert "installing" in repaired.stdout and repaired.stderr == ""
    is_ready(pod)
    # pip can't do it
    (pod.checkout/".venv"/"complete").unlink()
    with open(pod.checkout/"constraints.txt", "a") as pins: pins.write("optuna==0.0.1\n")
    failed = pod.init()
    assert failed.stderr.splitlines() == [f"kdcode: failed to install the packages ({said_last(pod)}); the whole story is in {pod.work}/.cache/kdcode/init.log", f"kdcode: to go on, open a terminal and run: bash {pod.checkout}/onyxia/init.sh"]
    assert not (pod.checkout/".venv"/"complete").exists()


def said_last(pod):
    """The last error in the log: one that names the cause."""
    error = [line for line in (pod.work/".cache"/"kdcode"/"init.log").read_text().splitlines() if re.match("(error|fatal)", line, re.IGNORECASE)][-1]
    assert "ResolutionImpossible" in error or "conflicting" in error
    return error


def test_init_says_what_is_wrong_in_one_line(pod):
    half = SCRIPT[:len(SCRIPT) * 2 // 3]  # the connection broke: nothing of it runs
    pod.run("bash", "-s", stdin=half, check=False)
    assert list(pod.work.iterdir()) == []
    assert "failed to clone https://github.com/kdcode/kdcode (fatal:" in only_line(pod.init(KDCODE_REPOSITORY="/nowhere.bundle"))
    pod.run("mkdir", "-p", pod.checkout/"runs")
    assert f"{pod.checkout} is there, and is no whole checkout" in only_line(pod.init(KDCODE_REPOSITORY=str(pod.repository)))
    shutil.rmtree(pod.checkout)
    pod.clone()
    assert "there is no python2.0 in " in only_line(pod.init(KDCODE_PYTHON="python2.0"), pod)
    with open(pod.work/".cache"/"kdcode"/"lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "this script is running already" in only_line(pod.init(), pod)
    assert pod.foreign() == []


def only_line(done, pod=None):
    """The line that says what is wrong; where there is a checkout, another follows that says how to go on."""
    said = done.stderr.splitlines()
    assert len(said) == 1 + (pod is not None) and all(line.startswith("kdcode: ") for line in said) and "ready" not in done.stdout, done.stderr
    assert pod is None or said[1] == f"kdcode: to go on, open a terminal and run: bash {pod.checkout}/onyxia/init.sh"
    return said[0]


class Package:
    """What is asked of an installed package."""
    def __init__(self, version, *requires): self.version, self.requires = version, list(requires)


def test_pins_go_with_the_torch_of_the_image(monkeypatch):
    lines = (ROOT/"constraints.txt").read_text().splitlines()
    monkeypatch.setattr(packages, "installed", lambda name: Package("2.12.0+cu130", "sympy==1.13.1", "Jinja2", "networkx>=99; python_version < '3'", "typing-extensions>=99"))
    pins = packages.constraints()
    assert "torch==2.12.0+cu130" in pins and any(line.startswith("Jinja2==") for line in pins) and any(line.startswith("networkx==") for line in pins)
    gone = [line.split("==")[0] for line in lines if "==" in line and line not in pins]
    assert gone == ["sympy", "torch", "typing_extensions"]
    for package in (Package("2.1.0"), None):  # too old, or none: torch is installed with the rest
        monkeypatch.setattr(packages, "installed", lambda name: package)
        assert packages.constraints() == lines


def test_what_is_missing_is_found(monkeypatch, tmp_path):
    found = packages.installed
    assert packages.missing({"dev"}) == ([] if Path(find_spec("kdcode").origin).parent.parent == ROOT else ["kdcode"])
    there = {"optuna": None, "s3fs": Package("2020.1", "fsspec>=9999"), "colorlog": None, "torch": Package("2.1.0")}
    monkeypatch.setattr(packages, "installed", lambda name: there[name] if name in there else found(name))
    assert {"optuna>=5", "fsspec>=9999", "torch>=2.10"} <= set(packages.missing({"dev"})) and "colorlog" not in packages.missing({"dev"})  # which only optuna needs
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    shutil.copy(ROOT/"pyproject.toml", tmp_path)
    assert "kdcode" in packages.missing(set()) and not any(name.startswith(("s3fs", "nbdev")) for name in packages.missing(set()))  # the checkout was moved


def test_the_script_is_sound(tmp_path):
    assert f"readonly REPOSITORY={SETTINGS['git_url']}  #" in SCRIPT
    assert os.access(ROOT/"onyxia"/"init.sh", os.X_OK)
    subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None: pytest.skip("shellcheck is not installed")
    done = subprocess.run([checker, ROOT/"onyxia"/"init.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def launched(link):
    """What Onyxia's launcher makes of a link: the chart, other parameters, and chart values by their path. A key with a dot is a chart value: true, false, null, a number, or a string between « and »."""
    place, _, query = link.partition("?")
    pairs = [part.split("=") for part in query.split("&")]
    assert place.startswith("https://datalab.sspcloud.fr/launcher/") and all(len(pair) == 2 for pair in pairs)  # a bare = or & would end it
    return place.removeprefix("https://datalab.sspcloud.fr/launcher/"), {key: value for key, value in pairs if "." not in key}, {tuple(key.split(".")): chart_value(value) for key, value in pairs if "." in key}


def chart_value(text):
    if text in ("true", "false", "null"): return json.loads(text)
    if re.match(r"[+-]?\.?\d", text): return float(text)
    assert text.isascii(), text
    return re.fullmatch("«([^»]*)»", unquote(text, errors="strict"))[1]


def test_launch_links_are_what_the_launcher_reads():
    raw = SETTINGS["git_url"].replace("github.com", "raw.githubusercontent.com") + f"/{SETTINGS['branch']}/onyxia/init.sh"  # as text, at the first request: Onyxia follows no redirect
    for image in ("jupyter-pytorch-gpu", "jupyter-pytorch"):
        chart, others, values = launched(launch.launch_link(image))
        assert (chart, others) == (f"ide/{image}", {"autoLaunch": "true", "name": "kdcode"})
        assert values == {("git", "repository"): SETTINGS["git_url"], ("init", "personalInit"): raw}
    _, _, values = launched(launch.launch_link("jupyter-pytorch", LESSON, port=True))
    assert (values["init", "personalInitArgs"], values["networking", "user", "enabled"]) == (LESSON, True)
    assert launch.launch_link("jupyter-pytorch-gpu").startswith("https://datalab.sspcloud.fr/launcher/ide/jupyter-pytorch-gpu?autoLaunch=true&name=kdcode&git.repository=%C2%ABhttps%3A%2F%2F")
    for image, notebook, message in (("jupyter-r", None, "no image 'jupyter-r'"), ("jupyter-pytorch", "nbs/none.ipynb", "no notebook 'nbs/none.ipynb'")):
        with pytest.raises(ValueError, match=message): launch.launch_link(image, notebook)


def test_launch_links_of_other_hosts(monkeypatch, tmp_path):
    (tmp_path/"settings.ini").write_text("[DEFAULT]\ngit_url = https://gitlab.example.org/a/b & c/\nbranch = main\n")
    (tmp_path/"two words.ipynb").write_text("{}")
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    _, _, values = launched(launch.launch_link("jupyter-pytorch"))
    assert values == {("git", "repository"): "https://gitlab.example.org/a/b & c", ("init", "personalInit"): "https://gitlab.example.org/a/b & c/-/raw/main/onyxia/init.sh"}
    with pytest.raises(ValueError, match="has a space in its path"): launch.launch_link("jupyter-pytorch", "two words.ipynb")


@pytest.mark.parametrize("page", ["README.md", "docs/onyxia.md"])
def test_pages_have_the_links(page):
    links = re.findall(r"https://datalab\.sspcloud\.fr/launcher/[^\s)>\"]+", (ROOT/page).read_text())
    made = {launch.launch_link(image, port=port) for image in launch.IMAGES for port in (False, True)}
    assert {launch.launch_link(image) for image in launch.IMAGES} <= set(links) <= made
