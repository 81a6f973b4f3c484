"""Push a student with the hub's own client to a small stand-in for the hub."""
import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kdcode.config import ConfigError
from kdcode.export import EXPORT_MARKER
from kdcode.hub import export_hub, push, write_hub_folder
from kdcode.student import Student, StudentConfig

TOKEN = "hf_token-of-a-test"


def upload_mode(file): return {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}


class Hub(BaseHTTPRequestHandler):
    """Answer the client's requests during a push, and keep the files."""

    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.chunks()
        self.server.requests.append((self.path, self.headers.get("Authorization")))
        if self.server.status != 200: return self.answer({"error": "no"}, self.server.status)
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{self.server.address}/me/draft", "name": "me/draft", "id": "me/draft"})
        if self.path == "/api/validate-yaml": return self.answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path: return self.answer({"files": list(map(upload_mode, json.loads(body)["files"]))})
        if "/commit/" in self.path: return self.commit(map(json.loads, body.splitlines()))
        self.answer({}, 404)

    def commit(self, lines):
        parts = [line["value"] for line in lines if line["key"] == "file"]
        self.server.files |= {part["path"]: base64.b64decode(part["content"]) for part in parts}
        commit = "0" * 40
        self.answer({"success": True, "commitOid": commit, "hookOutput": "", "pullRequestUrl": None,
                     "commitUrl": f"{self.server.address}/me/draft/commit/{commit}"})

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Authorization")))
        self.answer({"error": "no"}, 404 if self.server.status == 200 else self.server.status)

    def chunks(self):
        """Read the body of a chunked request."""
        found = b""
        while size := int(self.rfile.readline(), 16): found, _ = found + self.rfile.read(size), self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *message): pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.files, server.status = [], {}, 200
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder to push for a tiny student with a draft vocabulary."""
    path = tmp_path_factory.mktemp("hub")
    config = StudentConfig(
        vocab_size=49152, draft_vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, teacher="smollm2")
    Student(config).save_pretrained(path/"student")
    return write_hub_folder(path/"student", "smollm2", "me/draft", path/"out")


def test_the_hub_gets_the_folder_and_nothing_else(hub, folder):
    assert push(folder, "me/draft") == f"{hub.address}/me/draft"
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir() if file.name != EXPORT_MARKER}
    sent = {path for path, token in hub.requests if token == f"Bearer {TOKEN}"}
    assert sent >= {"/api/repos/create", "/api/models/me/draft/preupload/main", "/api/models/me/draft/commit/main"}
    for name, content in hub.files.items(): assert TOKEN.encode() not in content, name


@pytest.mark.parametrize("status", [401, 403, 500])
def test_an_http_error_is_one_line_without_the_token(hub, folder, status):
    hub.status = status
    with pytest.raises(ConfigError) as error: push(folder, "me/draft")
    message = str(error.value)
    assert str(status) in message and "\n" not in message and TOKEN not in message and not hub.files


def test_without_a_network_it_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="cannot push to .* check the network"): push(folder, "me/draft")


def test_the_address_comes_from_the_environment(hub, folder):
    """HF_ENDPOINT is read when the client is imported, so this needs its own process."""
    code = ("import sys; from pathlib import Path; from kdcode.hub import push; "
            "print(push(Path(sys.argv[1]), 'me/draft', private=True))")
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    done = subprocess.run([sys.executable, "-c", code, folder], env=environment, capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout.strip() == f"{hub.address}/me/draft", done.stderr
    assert "model.safetensors" in hub.files and TOKEN not in done.stdout + done.stderr


def test_nothing_is_pushed_without_a_token(tmp_path, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="HF_TOKEN is not set"):
        export_hub(folder, "smollm2", "me/draft", tmp_path/"out")
    assert not list(tmp_path.iterdir())
