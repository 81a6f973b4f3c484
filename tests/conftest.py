"""What several tests share: the repository's root, a tiny teacher in a folder, and the command as a process."""
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """A random Llama of two layers with SmolLM2's tokenizer, saved as safetensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from kdcode.teacher import load_tokenizer
    folder, tokenizer = tmp_path_factory.mktemp("teacher"), load_tokenizer("smollm2")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=512, initializer_range=.1, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def kdcode(tmp_path):
    """Runs the command in an empty working folder; returns the finished process."""
    def run(*words, timeout=300, **variables):
        environment = os.environ | {"KDCODE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
        return subprocess.run([sys.executable, "-m", "kdcode.cli", *map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout)
    return run


@pytest.fixture(scope="session")
def pair(tiny_teacher):
    """That teacher, and a student that begins with its first layer."""
    from kdcode.config import TeacherSettings
    from kdcode.student import Student
    from kdcode.teacher import load_teacher
    teacher = load_teacher(TeacherSettings(name=str(tiny_teacher), dtype="float32", device="cpu"))
    return teacher, Student.from_teacher(teacher.model, layers=[0]).eval()


def wait_until(true, seconds=60):
    """Waits for something that must happen."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(.01)


@pytest.fixture(scope="session")
def served(pair):
    """Serves both in a thread: gives a client, and the service."""
    import httpx
    from kdcode.config import Config, DecodeSettings, ServeSettings
    from kdcode.serve import Service, create_app, make_server

    @contextmanager
    def serving(**limits):
        service = Service(*pair, Config(decode=DecodeSettings(gamma=3, adaptive=False), serve=ServeSettings(**limits)))
        listening = socket.create_server(("127.0.0.1", 0))
        server = make_server(create_app(service))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        wait_until(lambda: server.started)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=120, limits=httpx.Limits(max_connections=100)) as client: yield client, service
        finally:
            server.should_exit = True
            thread.join()
    return serving
