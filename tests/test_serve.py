"""The server as clients meet it: many at once, gone in the middle, hostile, and told to end."""
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import wait_until

from kdcode.config import Config, DecodeSettings
from kdcode.serve import create_app, Service
from kdcode.decode import complete


def body(**changes):
    return {"model": "teacher0", "prompt": "def f(n):", "max_tokens": 20, "temperature": 0} | changes


def kinds():
    """Requests of eight kinds, greedy and sampled, short and long."""
    prompts = ("def f(n):", "import", "class Tree:\n    def __init__(self):", "x = [1, 2, 3]\n" * 5)
    return [body(prompt=prompt, max_tokens=5 + 9 * (i % 4), temperature=temperature, seed=i) for i, prompt in enumerate(prompts) for temperature in (0, 1)]


def alone(pair, asked):
    """The same text without a server."""
    settings = DecodeSettings(gamma=3, max_new_tokens=asked["max_tokens"], temperature=float(asked["temperature"]))
    return complete(*pair, asked["prompt"], settings, asked["seed"]).text


def memory():
    """Of this process, in MB."""
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_200_requests_from_16_clients(pair, served):
    wanted = {json.dumps(asked): alone(pair, asked) for asked in kinds()}
    requests = [kinds()[i % 8] | {"stream": i % 3 == 0} for i in range(200)]
    def ask(client, asked):
        reply = client.post("/v1/completions", json=asked)
        assert reply.status_code == 200, reply.text
        if not asked["stream"]: return reply.json()["choices"][0]["text"]
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
    with served(places=6) as (client, service), ThreadPoolExecutor(16) as clients:
        used = []
        for _ in range(2):
            found = list(clients.map(lambda asked: ask(client, asked), requests))
            assert found == [wanted[json.dumps({name: value for name, value in asked.items() if name != "stream"})] for asked in requests]
            used.append(memory())
        figures = client.get("/metrics").text
    assert used[1] - used[0] < 30, used
    assert 'kdcode_requests_total{path="/v1/completions",status="200"} 400.0' in figures
    assert "kdcode_running_requests 0.0" in figures and "kdcode_waiting_requests 0.0" in figures and "kdcode_first_token_seconds_count 400.0" in figures
    assert len(set(wanted.values())) == 8  # or equal answers would say nothing


def test_a_full_line_is_told_and_empties(pair, served):
    with served(places=1, waiting=2) as (client, service), ThreadPoolExecutor(12) as clients:
        replies = list(clients.map(lambda seed: client.post("/v1/completions", json=body(max_tokens=150, seed=seed)), range(12)))
        assert {reply.status_code for reply in replies} == {200, 429}
        for reply in replies:
            if reply.status_code == 429: assert reply.headers["Retry-After"] == "1" and reply.json()["error"]["code"] == "queue_full"
        assert client.post("/v1/completions", json=body()).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_place(pair, served, stream):
    with served(places=1) as (client, service):
        asked = json.dumps(body(max_tokens=450, stream=stream)).encode()
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(asked), asked))
            wait_until(lambda: service.scheduler.batch.texts)
            text = service.scheduler.batch.texts[0]
        assert client.post("/v1/completions", json=body(max_tokens=1)).status_code == 200  # with one place, only where the other has left
        assert not text.finished and service.scheduler.running == 0


def test_a_stop_string_ends_the_writing(pair, served):
    whole = alone(pair, body(max_tokens=200, seed=0))
    stop = whole[10:14]
    with served() as (client, service):
        for stream in (False, True):
            reply = client.post("/v1/completions", json=body(max_tokens=200, stop=[stop, "\0"], stream=stream))
            told = reply.json() if not stream else None
            text = told["choices"][0]["text"] if told else "".join(json.loads(line[6:])["choices"][0]["text"] for line in reply.text.splitlines() if line.startswith("data: {"))
            assert text == whole.split(stop)[0]
        assert told is None and client.post("/v1/completions", json=body(max_tokens=200, stop=stop)).json()["choices"][0]["finish_reason"] == "stop"
        assert service.scheduler.running == 0


def test_bodies_without_a_length_are_bounded(pair, served):
    def endless():
        for _ in range(1000): yield b"x" * 100_000
    with served(max_bytes=50_000) as (client, service):
        try: status = client.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"}).status_code
        except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError): status = 413  # the server has hung up on the rest
        assert status == 413
        assert client.post("/v1/completions", json=body()).status_code == 200


@pytest.mark.parametrize("content", [b"", b"null", b"[" * 20_000, b'{"model": "teacher0", "prompt": ' + b"9" * 5000 + b"}", b'{"model": "teacher0", "prompt": ["x", 1]}', b'{"model": "teacher0", "prompt": "x", "n": 1e400}', b"\xff\xfe", b'{"\\ud800": 1}', b'{"model": "' + b"m" * 10_000 + b'", "prompt": "x"}'])
def test_odd_bodies_are_told(pair, served, content):
    with served() as (client, service):
        reply = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        error = reply.json()["error"]
        assert reply.status_code in (400, 404) and set(error) == {"message", "type", "param", "code"} and 0 < len(error["message"]) <= 300 and "Traceback" not in error["message"]
        assert client.post("/v1/completions", json=body()).status_code == 200


def test_what_breaks_inside_is_not_told(pair, served, monkeypatch):
    with served() as (client, service):
        whole = service.scheduler.batch.round
        def breaks(): raise RuntimeError("secret detail")
        monkeypatch.setattr(service.scheduler.batch, "round", breaks)
        reply = client.post("/v1/completions", json=body())
        assert reply.status_code == 500 and "secret detail" not in reply.text and "log" in reply.json()["error"]["message"]
        streamed = client.post("/v1/completions", json=body(stream=True))
        assert '"server_error"' in streamed.text and "secret detail" not in streamed.text
        monkeypatch.setattr(service.scheduler.batch, "round", whole)
        assert client.post("/v1/completions", json=body()).status_code == 200


@pytest.mark.parametrize("known", [False, True])
def test_its_own_description(pair, served, known):
    """Whatever the description allows is answered as it says; with a known model too, where texts come out."""
    import hypothesis
    import schemathesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance
    service, answered, statuses = Service(*pair, Config(decode=DecodeSettings(gamma=2))), set(), set()
    for operation in schemathesis.openapi.from_asgi("/openapi.json", create_app(service)).get_all_operations():
        @hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(case=operation.ok().as_strategy())
        def holds(case):
            if known and isinstance(case.body, dict): case.body = case.body | {"model": "teacher0", "max_tokens": 3, "stream": False}
            reply = case.call()
            case.validate_response(reply, excluded_checks=[positive_data_acceptance] if known else [])  # no description says how long a prompt may be
            statuses.add(reply.status_code)
        holds()
        answered.add(operation.ok().label)
    service.scheduler.close()
    assert {"POST /v1/completions", "POST /v1/chat/completions", "GET /v1/models", "GET /metrics"} <= answered
    assert 500 not in statuses and 404 in statuses and (not known or 200 in statuses)


@pytest.fixture
def process(tmp_path, tiny_teacher, pair):
    """Starts `kdcode serve` on a port, and gives it when it is ready."""
    pair[1].save_pretrained(tmp_path/"student")
    running = []
    def start(*words, port=None, ready=True, **variables):
        if port is None:
            with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
        command = [sys.executable, "-m", "kdcode.cli", "serve", "--teacher.name", str(tiny_teacher), "--draft", str(tmp_path/"student"), "--serve.port", str(port), *words]
        environment = {name: value for name, value in os.environ.items() if name != "KDCODE_API_KEY"} | {"KDCODE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
        one = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(one)
        if ready: wait_until(lambda: one.poll() is not None or answers(port), 120)
        return one, port
    yield start
    for one in running:
        one.kill()
        one.communicate()


def answers(port):
    try: return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=1).status_code == 200
    except httpx.HTTPError: return False


def test_a_process_from_start_to_end(process):
    one, port = process(KDCODE_API_KEY="a-secret-token")
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer a-secret-token"}
    second, _ = process(port=port, ready=False, KDCODE_API_KEY="a-secret-token")
    out, err = second.communicate(timeout=120)
    assert second.returncode == 2 and err.count("\n") == 1 and "choose another --serve.port" in err
    assert httpx.post(f"{url}/v1/completions", json=body()).status_code == 401 and httpx.get(f"{url}/metrics").status_code == 401
    assert httpx.post(f"{url}/v1/completions", json=body(), headers=headers).status_code == 200
    with httpx.stream("POST", f"{url}/v1/completions", json=body(max_tokens=400, stream=True), headers=headers, timeout=60) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        one.send_signal(signal.SIGTERM)
        wait_until(lambda: not answers(port))  # who comes now is refused
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in ("length", "stop")
    out, err = one.communicate(timeout=60)
    assert one.returncode == 0 and "a-secret-token" not in out + err and "Traceback" not in err, err


def test_where_others_reach_it_a_token_is_needed(process):
    one, _ = process("--serve.host", "0.0.0.0", ready=False)
    out, err = one.communicate(timeout=120)
    assert one.returncode == 2 and err.count("\n") == 1 and "KDCODE_API_KEY" in err


def test_vllm_gets_the_right_arguments(process, tmp_path):
    (tmp_path/".engines"/"bin").mkdir(parents=True)
    program = tmp_path/".engines"/"bin"/"vllm"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\necho "key=$VLLM_API_KEY"\n')
    program.chmod(0o755)
    one, port = process("--engine", "vllm", "--decode.gamma", "3", ready=False, KDCODE_API_KEY="a-secret-token")
    out, err = one.communicate(timeout=120)
    words = out.splitlines()
    assert words[0] == "serve" and words[-1] == "key=a-secret-token" and words[words.index("--port") + 1] == str(port)
    drafting = json.loads(words[words.index("--speculative-config") + 1])
    assert drafting["num_speculative_tokens"] == 3 and os.path.exists(f"{drafting['model']}/model.safetensors") and os.path.exists(f"{words[1]}/model.safetensors")
