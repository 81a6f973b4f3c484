"""Shared fixtures: a tiny teacher in a folder, the command as a process, a running server."""
import gc
import itertools
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import pytest

import forked

ROOT = Path(__file__).parent.parent
COUNT = itertools.count()
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")


def pytest_collection_finish():
    """Exempt the imported libraries from garbage collections, which would take a fifth of the tests' time."""
    gc.freeze()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def save_random_llama(folder, head_scale=1., **sizes):
    """Save a random Llama with SmolLM2's tokenizer as safetensors, and return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from kdcode.teacher import load_tokenizer
    tokenizer = load_tokenizer("smollm2")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2, **sizes))
    model.lm_head.weight.data *= head_scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """A random Llama of two layers."""
    return save_random_llama(tmp_path_factory.mktemp("teacher"), num_hidden_layers=2, initializer_range=.1)


OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Forked:
    """A program, by default the command, in its own process, with the interface of `subprocess.Popen`."""
    def __init__(self, forks, words, folder, environment, program="kdcode.cli:main"):
        self.streams = [folder.parent/f"{folder.name}-{name}-{next(COUNT)}.txt" for name in ("out", "err")]
        arguments = (program, list(map(str, words)), folder, environment, *self.streams)
        self.process = forks.Process(target=forked.run, args=arguments, daemon=True)
        self.process.start()

    @property
    def returncode(self): return self.process.exitcode

    def poll(self): return self.process.exitcode

    def send_signal(self, number): os.kill(self.process.pid, number)

    def wait(self, timeout=None):
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} seconds"

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(path.read_text() for path in self.streams)


@pytest.fixture(scope="session")
def forks():
    """Start processes that have already imported the library: they fork from Python's fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kdcode.cli", "kdcode.bench", "kdcode.eval", "kdcode.export", "forked"])
    with pytest.MonkeyPatch.context() as environment:
        for name, value in OFFLINE.items(): environment.setenv(name, value)  # both are read at import
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(forks, tmp_path):
    """Start the command in an empty working folder, without waiting for it."""
    def starting(*words, program="kdcode.cli:main", **variables):
        environment = os.environ | OFFLINE | {"KDCODE_HOME": str(tmp_path)} | variables
        return Forked(forks, words, tmp_path, environment, program)
    return starting


@pytest.fixture
def kdcode(start, tmp_path):
    """Run the command in an empty working folder and return the finished process.

    A fresh one is a new Python process, as a shell starts it.
    """
    def run(*words, timeout=300, fresh=False, **variables):
        if fresh:
            python = [sys.executable, "-m", "kdcode.cli", *map(str, words)]
            environment = os.environ | OFFLINE | {"KDCODE_HOME": str(tmp_path)} | variables
            options = {"capture_output": True, "text": True, "timeout": timeout}
            return subprocess.run(python, cwd=tmp_path, env=environment, **options)
        process = start(*words, **variables)
        return subprocess.CompletedProcess(words, process.wait(timeout) or process.returncode, *process.communicate())
    return run


@pytest.fixture(scope="session")
def pair(tiny_teacher):
    """The tiny teacher, and a student that starts with its first layer."""
    from kdcode.config import TeacherSettings
    from kdcode.student import Student
    from kdcode.teacher import load_teacher
    teacher = load_teacher(TeacherSettings(name=str(tiny_teacher), dtype="float32", device="cpu"))
    return teacher, Student.from_teacher(teacher.model, layers=[0]).eval()


@pytest.fixture
def step(request, monkeypatch):
    """Let decoders and drafters use a form of the step (ordinary, static, compiled), and check that it was used.

    A compiled model compiles what is missing, and a call that does not fit its graph is an error. "replayed" is a
    static step with the sizes and the storage of CUDA graphs.
    """
    from kdcode import compiled_step, decode, drafters
    from kdcode.compiled_step import CompiledModel, StaticModel
    used = []

    class Form(CompiledModel if request.param == "compiled" else StaticModel):
        def __init__(self, model, capacity, batch_size=1, compile="auto"):
            if request.param == "compiled": super().__init__(model, capacity, batch_size, True)
            else: super().__init__(model, capacity, batch_size)

        def is_ready(self, tokens, hidden_layers):
            ready = request.param != "ordinary" and super().is_ready(tokens, hidden_layers)
            used.append(ready)
            return ready

    if request.param == "replayed": monkeypatch.setattr(compiled_step, "uses_cuda_graphs", lambda device: True)
    if request.param == "compiled": Form.stance = "fail_on_recompile"
    for module in (decode, drafters): monkeypatch.setattr(module, "CompiledModel", Form)
    yield request.param
    assert any(used) == (request.param != "ordinary")


def step_forms(*forms):
    """Return a decorator that runs a test with these forms of the step."""
    return pytest.mark.parametrize("step", forms, indirect=True)


def wait_until(true, seconds=300):
    """Wait for a condition that must become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(.01)


@pytest.fixture(scope="session")
def served(pair):
    """Serve both in a thread; yields a client and the service."""
    import httpx
    from kdcode.config import Config, DecodeSettings, ServeSettings
    from kdcode.serve import create_app, make_server, Service

    @contextmanager
    def serving(models=pair, key=None, **limits):
        config = Config(decode=DecodeSettings(gamma=3, adaptive=False), serve=ServeSettings(**limits))
        service = Service(*models, config)
        listening = socket.create_server(("127.0.0.1", 0))
        server = make_server(create_app(service, key))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        wait_until(lambda: server.started)
        url, limits = f"http://127.0.0.1:{listening.getsockname()[1]}", httpx.Limits(max_connections=100)
        try:
            with httpx.Client(base_url=url, timeout=300, limits=limits) as client: yield client, service
        finally:
            server.should_exit = True
            thread.join()
    return serving


@contextmanager
def start_jupyterlab(python, folder, state, **variables):
    """Run JupyterLab of an environment in a folder, with its settings in another; yields its address."""
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
             "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    environment = os.environ | OFFLINE | {name: str(state/name) for name in names} | {"PYTHONPATH": str(ROOT)}
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    options = (f"--ServerApp.port={port}", "--ServerApp.token=", "--ServerApp.password=", "--no-browser",
               f"--ServerApp.root_dir={folder}", "--allow-root")
    address, log = f"http://127.0.0.1:{port}", state/"log.txt"
    with log.open("w") as out:
        server = subprocess.Popen([python, "-m", "jupyterlab", *options], env=environment | variables, stdout=out,
                                  stderr=out)

    def answers():
        assert server.poll() is None, log.read_text()
        try: return urllib.request.urlopen(f"{address}/api").status == 200
        except OSError: return False
    try:
        wait_until(answers)
        yield address
    finally:
        server.terminate()
        server.wait(60)
