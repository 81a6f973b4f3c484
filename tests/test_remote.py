"""Trainings beside servers, with the variables that Onyxia gives: S3 by AWS_*, MLflow by MLFLOW_TRACKING_URI. None of them can end one."""
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
from kdcode.config import Config
from kdcode.callbacks import MLflowTracking, remote_folder

KEYS = {"AWS_ACCESS_KEY_ID": "ACCESSKEY0123456789", "AWS_SECRET_ACCESS_KEY": "SECRETKEY0123456789", "AWS_SESSION_TOKEN": "a-session-token-0123456789", "AWS_DEFAULT_REGION": "us-east-2"}
SHORT = ["--data.tokens", 4096, "--data.validation_tokens", 512, "--data.block_size", 64, "--student.layers", "[0]", "--student.draft_vocabulary", 1000,
         "--train.batch_size", 4, "--train.eval_steps", 4, "--train.logging_steps", 1]
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(port):
    with socket.socket() as probe: return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def serve_s3(tmp_path):
    """Starts real S3 servers of one folder; gives their ports."""
    (tmp_path/"s3"/"bucket").mkdir(parents=True)
    running = []
    def start(*options):
        port = free_port()
        command = [Path(sys.executable).parent/"rclone", "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "ACCESSKEY0123456789,SECRETKEY0123456789", *options, tmp_path/"s3"]
        running.append(subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_until(lambda: answers(port))
        return port
    yield start
    for process in running:
        process.kill()
        process.wait()


class Gate(BaseHTTPRequestHandler):
    """Hands requests on to the S3 server behind it, and keeps their headers; from a certain file on, the token has expired."""
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        gate, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        gate.seen.append(dict(self.headers))
        if gate.expired: status, headers, answer = 403, [("Content-Type", "application/xml")], EXPIRED
        else: status, headers, answer = self.ask(body)
        if gate.last and self.command == "PUT" and self.path.split("?")[0].endswith(gate.last): gate.expired = True
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"): self.send_header(name, value)
        self.send_header("Content-Length", dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(answer)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(answer)

    def ask(self, body):
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect": behind.putheader(name, value)
        behind.endheaders(body)
        answer = behind.getresponse()
        content = answer.read()
        behind.close()
        return answer.status, answer.getheaders(), content

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    def log_message(self, *about): pass


@pytest.fixture
def gate(serve_s3):
    """A server that tells what it was asked, in front of a real one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    server.behind, server.seen, server.expired, server.last = serve_s3(), [], False, None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def put(monkeypatch, tmp_path, **variables):
    """Writes a file to s3://bucket with these variables, reads it again, and removes it."""
    import s3fs
    for name in (*KEYS, "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_S3_ENDPOINT", "AWS_CA_BUNDLE"): monkeypatch.delenv(name, raising=False)
    for name, value in variables.items(): monkeypatch.setenv(name, str(value))
    s3fs.S3FileSystem.clear_instance_cache()
    (tmp_path/"here.txt").write_text("a checkpoint")
    files, root = remote_folder("s3://bucket/run")
    files.put_file(str(tmp_path/"here.txt"), f"{root}/there.txt")
    there = tmp_path/"s3"/"bucket"/"run"/"there.txt"
    assert there.read_text() == files.cat_file(f"{root}/there.txt").decode() == "a checkpoint"
    there.unlink()


def test_the_variables_of_onyxia_are_honoured(monkeypatch, tmp_path, gate):
    url = f"http://127.0.0.1:{gate.server_port}"
    put(monkeypatch, tmp_path, **KEYS, AWS_ENDPOINT_URL=f"{url}/", AWS_S3_ENDPOINT="nowhere.invalid")  # with a slash at its end, as the chart has it
    assert len(gate.seen) >= 2
    for headers in gate.seen:
        assert headers["X-Amz-Security-Token"] == KEYS["AWS_SESSION_TOKEN"]
        assert "/us-east-2/s3/aws4_request" in headers["Authorization"] and "x-amz-security-token" in headers["Authorization"]
    put(monkeypatch, tmp_path, **KEYS, AWS_S3_ENDPOINT=url)
    put(monkeypatch, tmp_path, **KEYS, AWS_ENDPOINT_URL_S3=url, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    gate.seen.clear()
    put(monkeypatch, tmp_path, **KEYS | {"AWS_SESSION_TOKEN": "", "AWS_DEFAULT_REGION": ""}, AWS_ENDPOINT_URL=url)  # what the chart writes where there are none
    assert all("X-Amz-Security-Token" not in headers for headers in gate.seen) and gate.seen
    with pytest.raises(PermissionError): put(monkeypatch, tmp_path, **KEYS | {"AWS_SECRET_ACCESS_KEY": "another-secret"}, AWS_ENDPOINT_URL=url)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="a certificate is made with openssl")
def test_a_host_without_a_scheme_is_reached_by_https(monkeypatch, tmp_path, serve_s3):
    certificate, key = tmp_path/"certificate.pem", tmp_path/"key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    port = serve_s3("--cert", certificate, "--key", key)
    put(monkeypatch, tmp_path, **KEYS, AWS_S3_ENDPOINT=f"localhost:{port}", AWS_CA_BUNDLE=certificate)


def test_a_token_that_expires_never_ends_a_training(kdcode, tiny_teacher, tmp_path, gate):
    gate.last = "checkpoint-4/trainer_state.json"
    done = kdcode("distill", "--teacher.name", tiny_teacher, *SHORT, "--train.upload", "s3://bucket/run", "--name", "expired", **KEYS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{gate.server_port}/")
    run, copies = tmp_path/"runs"/"expired", tmp_path/"s3"/"bucket"/"run"
    assert done.returncode == 0 and (run/"student"/"model.safetensors").exists(), done.stderr
    assert (copies/"checkpoint-4"/"trainer_state.json").exists() and not (copies/"student").exists()
    assert "upload of checkpoint-16 failed (PermissionError" in done.stderr and "expired" in done.stderr and "train.upload has no copy of" in done.stderr
    assert not any(secret in done.stderr for secret in (KEYS["AWS_SECRET_ACCESS_KEY"], KEYS["AWS_SESSION_TOKEN"], "Traceback"))


def test_a_training_is_reported_to_mlflow(kdcode, tiny_teacher, tmp_path):
    mlflow, uri = pytest.importorskip("mlflow"), f"sqlite:///{tmp_path/'mlflow.db'}"
    done = kdcode("distill", "--teacher.name", tiny_teacher, *SHORT, "--loss.alpha", .25, "--name", "reported", MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0 and "MLflow failed" not in done.stderr, done.stderr
    client = mlflow.MlflowClient(uri)
    run, = client.search_runs([client.get_experiment_by_name("kdcode").experiment_id])
    assert (run.info.run_name, run.info.status) == ("reported", "FINISHED")
    assert (run.data.params["config.loss.alpha"], run.data.params["config.name"], run.data.params["per_device_train_batch_size"]) == ("0.25", "reported", "4")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "eval_acceptance_rate")] == [0, 4, 8, 12, 16]
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 16


def test_a_dead_mlflow_server_never_ends_a_training(kdcode, tiny_teacher, tmp_path):
    done = kdcode("distill", "--teacher.name", tiny_teacher, *SHORT, "--name", "alone", MLFLOW_TRACKING_URI=f"http://person:a-password@127.0.0.1:{free_port()}", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")
    assert done.returncode == 0 and (tmp_path/"runs"/"alone"/"student"/"model.safetensors").exists(), done.stderr
    said = [line for line in done.stderr.splitlines() if "MLflow" in line or "MLFLOW" in line]
    assert len(said) == 1 and ("reporting to MLflow failed" if find_spec("mlflow") else "mlflow is not installed") in said[0], done.stderr
    assert "a-password" not in done.stderr and "Traceback" not in done.stderr


def test_a_server_that_dies_in_the_middle_is_told_of_once(monkeypatch, capsys):
    mlflow, calls = pytest.importorskip("mlflow"), []
    def dead(**details):
        calls.append(details)
        raise ConnectionError("no answer from http://person:a-password@server\nand a long story")
    monkeypatch.setattr(mlflow, "log_metrics", dead)
    tracking, state = MLflowTracking(Config()), TrainerState(global_step=1, is_world_process_zero=True)
    tracking._initialized, tracking._async_log = True, False
    for step in range(3): tracking.on_log(None, state, None, logs={"loss": 1. / (step + 1)})
    tracking.on_train_end(None, state, None)
    assert len(calls) == 1
    assert capsys.readouterr().err == "reporting to MLflow failed (ConnectionError: no answer from http://server); training goes on without it, and its log is in the run's folder\n"
