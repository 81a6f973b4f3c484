"""Training beside remote services, configured by Onyxia's variables (S3 by AWS_*, MLflow by MLFLOW_TRACKING_URI).

A failure of a remote service never ends a training.
"""
import http.client
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import TrainerState

from conftest import wait_until
from kdcode.callbacks import MLflowTracking
from kdcode.config import Config
from kdcode.files import ENDPOINT_VARIABLES, remote_folder

ACCESS_KEY, SECRET_KEY = "ACCESSKEY0123456789", "SECRETKEY0123456789"
KEYS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_SESSION_TOKEN": "a-session-token-0123456789", "AWS_DEFAULT_REGION": "us-east-2"}
SHORT_RUN = ["--data.tokens", 4096, "--data.validation_tokens", 512, "--data.block_size", 64, "--student.layers", "[0]",
             "--student.draft_vocabulary", 1000, "--train.batch_size", 4, "--train.eval_steps", 4,
             "--train.logging_steps", 1]
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def serve_s3(tmp_path):
    """Start real S3 servers (rclone) over one folder; a call returns the port of a new one."""
    (tmp_path/"s3"/"bucket").mkdir(parents=True)
    running = []

    def start(*options):
        port = free_port()
        command = [Path(sys.executable).parent/"rclone", "serve", "s3", "--addr", f"127.0.0.1:{port}",
                   "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", *options, tmp_path/"s3"]
        running.append(subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_until(lambda: listens(port))
        return port

    yield start
    for process in running:
        process.kill()
        process.wait()


class Proxy(BaseHTTPRequestHandler):
    """A proxy in front of an S3 server that records request headers; after a given upload the token has expired."""
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        proxy, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.requests.append(dict(self.headers))
        if proxy.expired:
            status, headers, content = 403, [("Content-Type", "application/xml")], EXPIRED
        else:
            status, headers, content = self.forward(body)
        last_upload = proxy.last_upload and self.path.split("?")[0].endswith(proxy.last_upload)
        if last_upload and self.command == "PUT":
            proxy.expired = True
        self.respond(status, headers, content)

    def forward(self, body):
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect":
                upstream.putheader(name, value)
        upstream.endheaders(body)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        return response.status, response.getheaders(), content

    def respond(self, status, headers, content):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        head = self.command == "HEAD"  # no content, but its length
        self.send_header("Content-Length", dict(headers).get("Content-Length", "0") if head else str(len(content)))
        self.end_headers()
        if not head:
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    def log_message(self, *args): pass


@pytest.fixture
def proxy(serve_s3):
    """Run a `Proxy` in front of a real S3 server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.upstream, server.requests, server.expired, server.last_upload = serve_s3(), [], False, None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def round_trip(monkeypatch, tmp_path, **variables):
    """Write a file to s3://bucket with these environment variables, read it again and delete it."""
    import s3fs
    for name in (*KEYS, *ENDPOINT_VARIABLES, "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    s3fs.S3FileSystem.clear_instance_cache()
    (tmp_path/"local.txt").write_text("a checkpoint")
    files, root = remote_folder("s3://bucket/run")
    files.put_file(str(tmp_path/"local.txt"), f"{root}/remote.txt")
    stored = tmp_path/"s3"/"bucket"/"run"/"remote.txt"
    assert stored.read_text() == files.cat_file(f"{root}/remote.txt").decode() == "a checkpoint"
    stored.unlink()


def test_variables_of_onyxia(monkeypatch, tmp_path, proxy):
    url = f"http://127.0.0.1:{proxy.server_port}"
    with_slash = {"AWS_ENDPOINT_URL": f"{url}/", "AWS_S3_ENDPOINT": "nowhere.invalid"}  # as Onyxia's chart writes it
    round_trip(monkeypatch, tmp_path, **KEYS, **with_slash)
    assert len(proxy.requests) >= 2
    for headers in proxy.requests:
        assert headers["X-Amz-Security-Token"] == KEYS["AWS_SESSION_TOKEN"]
        assert "/us-east-2/s3/aws4_request" in headers["Authorization"]
        assert "x-amz-security-token" in headers["Authorization"]
    round_trip(monkeypatch, tmp_path, **KEYS, AWS_S3_ENDPOINT=url)
    round_trip(monkeypatch, tmp_path, **KEYS, AWS_ENDPOINT_URL_S3=url, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    proxy.requests.clear()
    empty = {"AWS_SESSION_TOKEN": "", "AWS_DEFAULT_REGION": ""}  # what the chart writes if there are none
    round_trip(monkeypatch, tmp_path, **KEYS | empty, AWS_ENDPOINT_URL=url)
    assert proxy.requests and all("X-Amz-Security-Token" not in headers for headers in proxy.requests)
    with pytest.raises(PermissionError):
        round_trip(monkeypatch, tmp_path, **KEYS | {"AWS_SECRET_ACCESS_KEY": "another-secret"}, AWS_ENDPOINT_URL=url)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_endpoint_without_scheme_uses_https(monkeypatch, tmp_path, serve_s3):
    certificate, key = tmp_path/"certificate.pem", tmp_path/"key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    port = serve_s3("--cert", certificate, "--key", key)
    round_trip(monkeypatch, tmp_path, **KEYS, AWS_S3_ENDPOINT=f"localhost:{port}", AWS_CA_BUNDLE=certificate)


def test_expired_token_does_not_end_a_training(kdcode, tiny_teacher, tmp_path, proxy):
    proxy.last_upload = "checkpoint-4/trainer_state.json"
    done = kdcode("distill", "--teacher.name", tiny_teacher, *SHORT_RUN, "--train.upload", "s3://bucket/run",
                  "--name", "expired", **KEYS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.server_port}/")
    run, copies = tmp_path/"runs"/"expired", tmp_path/"s3"/"bucket"/"run"
    assert done.returncode == 0 and (run/"student"/"model.safetensors").exists(), done.stderr
    assert (copies/"checkpoint-4"/"trainer_state.json").exists() and not (copies/"student").exists()
    for part in ("upload of checkpoint-16 failed (PermissionError", "expired", "train.upload has no copy of"):
        assert part in done.stderr
    for secret in (KEYS["AWS_SECRET_ACCESS_KEY"], KEYS["AWS_SESSION_TOKEN"], "Traceback"):
        assert secret not in done.stderr


def test_training_is_logged_to_mlflow(kdcode, tiny_teacher, tmp_path):
    mlflow, uri = pytest.importorskip("mlflow"), f"sqlite:///{tmp_path/'mlflow.db'}"
    done = kdcode("distill", "--teacher.name", tiny_teacher, *SHORT_RUN, "--loss.alpha", .25, "--name", "logged",
                  MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0 and "MLflow failed" not in done.stderr, done.stderr
    client = mlflow.MlflowClient(uri)
    run, = client.search_runs([client.get_experiment_by_name("kdcode").experiment_id])
    assert (run.info.run_name, run.info.status) == ("logged", "FINISHED")
    expected = {"config.loss.alpha": "0.25", "config.name": "logged", "per_device_train_batch_size": "4"}
    assert {name: run.data.params[name] for name in expected} == expected
    rates = client.get_metric_history(run.info.run_id, "eval_acceptance_rate")
    assert [point.step for point in rates] == [0, 4, 8, 12, 16]
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 16


def test_unreachable_mlflow_does_not_end_a_training(kdcode, tiny_teacher, tmp_path):
    uri = f"http://user:a-password@127.0.0.1:{free_port()}"
    done = kdcode("distill", "--teacher.name", tiny_teacher, *SHORT_RUN, "--name", "unreachable",
                  MLFLOW_TRACKING_URI=uri, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"runs"/"unreachable"/"student"/"model.safetensors").exists()
    warnings = [line for line in done.stderr.splitlines() if "MLflow" in line or "MLFLOW" in line]
    expected = "logging to MLflow failed" if find_spec("mlflow") else "mlflow is not installed"
    assert len(warnings) == 1 and expected in warnings[0], done.stderr
    assert "a-password" not in done.stderr and "Traceback" not in done.stderr


def test_mlflow_error_is_reported_once(monkeypatch, capsys):
    mlflow, calls = pytest.importorskip("mlflow"), []

    def fails(**metrics):
        calls.append(metrics)
        raise ConnectionError("no answer from http://user:a-password@server\nand a long traceback")

    monkeypatch.setattr(mlflow, "log_metrics", fails)
    tracking, state = MLflowTracking(Config()), TrainerState(global_step=1, is_world_process_zero=True)
    tracking._initialized, tracking._async_log = True, False
    for step in range(3):
        tracking.on_log(None, state, None, logs={"loss": 1. / (step + 1)})
    tracking.on_train_end(None, state, None)
    assert len(calls) == 1
    assert capsys.readouterr().err == (
        "logging to MLflow failed (ConnectionError: no answer from http://server); "
        "training continues without it, and the run folder has the whole log\n")
