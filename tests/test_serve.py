"""The server under real clients: many at once, disconnecting, malicious, and during shutdown."""
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

from kdcode.config import Config, DecodeSettings, ServeSettings
from kdcode.decode import complete
from kdcode.serve import create_app, Service

PATH = "/v1/completions"
JSON = {"Content-Type": "application/json"}


def request_body(**changes):
    return {"model": "teacher0", "prompt": "def f(n):", "max_tokens": 20, "temperature": 0} | changes


def different_requests():
    """Eight requests, greedy and sampled, short and long."""
    prompts = ("def f(n):", "import", "class Tree:\n    def __init__(self):", "x = [1, 2, 3]\n" * 5)
    return [request_body(prompt=prompt, max_tokens=5 + 9 * (i % 4), temperature=temperature, seed=i)
            for i, prompt in enumerate(prompts) for temperature in (0, 1)]


def solo_text(pair, request):
    """The text of a request without a server."""
    settings = DecodeSettings(gamma=3, max_new_tokens=request["max_tokens"], temperature=float(request["temperature"]))
    return complete(*pair, request["prompt"], settings, request.get("seed", 0)).text


def streamed_text(response):
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


def resident_memory():
    """Memory of this process, in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.parametrize("count", [48, pytest.param(200, marks=pytest.mark.slow)])
def test_requests_from_16_clients(pair, served, count):
    expected = {json.dumps(request): solo_text(pair, request) for request in different_requests()}
    requests = [different_requests()[i % 8] for i in range(count)]

    def send(client, i):
        stream = i % 3 == 0
        response = client.post(PATH, json=requests[i] | {"stream": stream})
        assert response.status_code == 200, response.text
        return streamed_text(response) if stream else response.json()["choices"][0]["text"]

    with served(slots=6) as (client, service), ThreadPoolExecutor(16) as clients:
        memory = []
        for _ in range(2):
            texts = list(clients.map(lambda i: send(client, i), range(count)))
            assert texts == [expected[json.dumps(request)] for request in requests]
            memory.append(resident_memory())
        metrics = client.get("/metrics").text
    assert memory[1] - memory[0] < 30, memory
    for line in (f'kdcode_requests_total{{path="{PATH}",status="200"}} {2 * count}.0', "kdcode_running_requests 0.0",
                 "kdcode_waiting_requests 0.0", f"kdcode_first_token_seconds_count {2 * count}.0"):
        assert line in metrics, line
    assert len(set(expected.values())) == 8  # control: the eight requests have different texts


def test_a_full_queue_returns_429_and_drains(pair, served):
    with served(slots=1, queue_size=2) as (client, service), ThreadPoolExecutor(12) as clients:
        def send(seed): return client.post(PATH, json=request_body(max_tokens=150, seed=seed))
        responses = list(clients.map(send, range(12)))
        assert {response.status_code for response in responses} == {200, 429}
        for response in responses:
            if response.status_code == 429:
                assert response.headers["Retry-After"] == "1" and response.json()["error"]["code"] == "queue_full"
        assert client.post(PATH, json=request_body()).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_its_slot(pair, served, stream):
    with served(slots=1) as (client, service):
        content = json.dumps(request_body(max_tokens=450, stream=stream))
        header = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
                  f"Content-Length: {len(content)}"]
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall("\r\n".join([*header, "", content]).encode())
            wait_until(lambda: service.scheduler.batch.sequences)
            sequence = service.scheduler.batch.sequences[0]
        response = client.post(PATH, json=request_body(max_tokens=1))  # with one slot, only after it was freed
        assert response.status_code == 200
        assert not sequence.finished and service.scheduler.running == 0


def test_a_stop_string_ends_decoding(pair, served):
    whole = solo_text(pair, request_body(max_tokens=200, seed=0))
    stop = whole[10:14]
    with served() as (client, service):
        request = request_body(max_tokens=200, stop=[stop, "\0"])
        choice = client.post(PATH, json=request).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (whole.split(stop)[0], "stop")
        assert streamed_text(client.post(PATH, json=request | {"stream": True})) == whole.split(stop)[0]
        choice = client.post(PATH, json=request | {"stop": stop}).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert service.scheduler.running == 0


@pytest.mark.parametrize("from_prompt", [0, 2])
def test_stop_strings_mean_the_same_as_in_generate(pair, served, from_prompt):
    """The stop string ends in the third character of the new text, and may begin in the last two of the prompt."""
    request = request_body(max_tokens=30, seed=0)
    prompt, whole = request["prompt"], solo_text(pair, request)
    stop = prompt[len(prompt) - from_prompt:] + whole[:3]
    expected = complete(*pair, prompt, DecodeSettings(gamma=3, max_new_tokens=30, stop=[stop]))
    with served() as (client, _):
        response = client.post(PATH, json=request | {"stop": stop}).json()
    choice = response["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert response["usage"]["completion_tokens"] == len(expected.tokens) < 30


def test_a_keyless_server_rejects_other_hosts(pair, served):
    """DNS rebinding: the browser sends the name of an attacker's page to 127.0.0.1."""
    with served() as (client, _):
        for path in ("/v1/models", "/"):
            assert client.get(path, headers={"Host": "evil.example"}).status_code == 403
            assert client.get(path, headers={"Host": "localhost:8000"}).status_code == 200
    with served(origins=["https://hub.example.org"]) as (client, _):  # Jupyter's proxy forwards the browser's host
        assert client.get("/v1/models", headers={"Host": "hub.example.org"}).status_code == 200
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_origins_are_opt_in(pair, served):
    """A page of another origin may use the API only if the settings name its origin."""
    origin = "https://app.example.org"
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = "Access-Control-Allow-Origin"
    with served() as (client, _):
        assert client.options(PATH, headers=preflight).status_code == 405
        assert allowed not in client.get("/v1/models", headers={"Origin": origin}).headers
    with served(origins=[origin]) as (client, _):
        response = client.options(PATH, headers=preflight)
        assert response.status_code == 200 and response.headers[allowed] == origin
        assert client.post(PATH, json=request_body(), headers={"Origin": origin}).headers[allowed] == origin
        assert client.post(PATH, json={}, headers={"Origin": origin}).headers[allowed] == origin  # errors are readable
        other = client.options(PATH, headers=preflight | {"Origin": "https://evil.example"})
        assert other.status_code == 400 and allowed not in other.headers


def test_a_preflight_needs_no_api_key(pair):
    from starlette.testclient import TestClient
    service = Service(*pair, Config(serve=ServeSettings(origins=["https://app.example.org"])))
    client = TestClient(create_app(service, "a-secret-key"))
    headers = {"Origin": "https://app.example.org", "Access-Control-Request-Method": "POST"}
    assert client.options(PATH, headers=headers).status_code == 200
    assert client.post(PATH, json=request_body(), headers={"Origin": headers["Origin"]}).status_code == 401
    service.scheduler.close()


def test_a_waiting_stream_is_kept_alive(pair, served, monkeypatch):
    """With one slot, the second stream waits in the queue; proxies must neither buffer nor close it."""
    monkeypatch.setattr("kdcode.serve.keep_alive.__defaults__", (.02,))
    with served(slots=1) as (client, service), ThreadPoolExecutor(1) as clients:
        first = clients.submit(client.post, PATH, json=request_body(max_tokens=300))
        wait_until(lambda: service.scheduler.running)
        second = client.post(PATH, json=request_body(max_tokens=3, stream=True))
        assert first.result().status_code == 200
    assert second.headers["X-Accel-Buffering"] == "no"
    assert ": keep-alive\n\n" in second.text and second.text.endswith("data: [DONE]\n\n")


def test_a_body_without_a_length_is_limited(pair, served):
    def endless():
        for _ in range(1000): yield b"x" * 100_000
    with served(max_bytes=50_000) as (client, service):
        try: status = client.post(PATH, content=endless(), headers=JSON).status_code
        except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError): status = 413  # the connection was closed
        assert status == 413
        assert client.post(PATH, json=request_body()).status_code == 200


@pytest.mark.parametrize("content", [
    b"",
    b"null",
    b"[" * 20_000,
    b'{"model": "teacher0", "prompt": ' + b"9" * 5000 + b"}",
    b'{"model": "teacher0", "prompt": ["x", 1]}',
    b'{"model": "teacher0", "prompt": "x", "n": 1e400}',
    b"\xff\xfe",
    b'{"\\ud800": 1}',
    b'{"model": "' + b"m" * 10_000 + b'", "prompt": "x"}',
])
def test_a_malformed_body_is_an_error_of_the_client(pair, served, content):
    with served() as (client, service):
        response = client.post(PATH, content=content, headers=JSON)
        error = response.json()["error"]
        assert response.status_code in (400, 404) and set(error) == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) <= 300 and "Traceback" not in error["message"]
        assert client.post(PATH, json=request_body()).status_code == 200


def test_internal_errors_are_not_disclosed(pair, served, monkeypatch):
    with served() as (client, service):
        working_step = service.scheduler.batch.step
        def fail(): raise RuntimeError("secret detail")
        monkeypatch.setattr(service.scheduler.batch, "step", fail)
        response = client.post(PATH, json=request_body())
        assert response.status_code == 500 and "secret detail" not in response.text
        assert "log" in response.json()["error"]["message"]
        streamed = client.post(PATH, json=request_body(stream=True))
        assert '"server_error"' in streamed.text and "secret detail" not in streamed.text
        monkeypatch.setattr(service.scheduler.batch, "step", working_step)
        assert client.post(PATH, json=request_body()).status_code == 200


@pytest.mark.parametrize("known_model", [False, True])
def test_responses_match_the_openapi_description(pair, served, known_model):
    """Random requests that the description allows; with a known model, completions are generated as well."""
    import hypothesis
    import schemathesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance
    serve = ServeSettings(origins=["http://testserver"])  # the host of the requests
    service, tested, statuses = Service(*pair, Config(decode=DecodeSettings(gamma=2), serve=serve)), set(), set()
    # a description cannot limit the number of tokens, nor say that this model has no tokens for infilling
    def excluded(path): return [positive_data_acceptance] if known_model or path == "/infill" else []
    settings = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None,
                                   suppress_health_check=list(hypothesis.HealthCheck))
    for operation in schemathesis.openapi.from_asgi("/openapi.json", create_app(service)).get_all_operations():
        @settings
        @hypothesis.given(case=operation.ok().as_strategy())
        def check(case):
            if known_model and isinstance(case.body, dict):
                case.body = case.body | {"model": "teacher0", "max_tokens": 3, "stream": False}
            elif isinstance(case.body, dict):  # a description cannot express what these require of each other
                for name in ("response_format", "tools", "tool_choice"): case.body.pop(name, None)
            response = case.call()
            case.validate_response(response, excluded_checks=excluded(case.path))
            statuses.add(response.status_code)
        check()
        tested.add(operation.ok().label)
    service.scheduler.close()
    assert {"POST /v1/completions", "POST /v1/chat/completions", "POST /infill", "GET /v1/models",
            "GET /metrics"} <= tested
    assert 500 not in statuses and 404 in statuses and (not known_model or 200 in statuses)


@pytest.fixture
def process(tmp_path, tiny_teacher, pair):
    """Start `kdcode serve` on a free port, and wait until it is ready."""
    pair[1].save_pretrained(tmp_path/"student")
    processes = []

    def start(*arguments, port=None, ready=True, **variables):
        if port is None:
            with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
        command = [sys.executable, "-m", "kdcode.cli", "serve", "--teacher.name", str(tiny_teacher),
                   "--draft", str(tmp_path/"student"), "--serve.port", str(port),
                   "--decode.compile", "off", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "KDCODE_API_KEY"}
        environment |= {"KDCODE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(server)
        if ready: wait_until(lambda: server.poll() is not None or is_ready(port), 120)
        return server, port

    yield start
    for server in processes:
        server.kill()
        server.communicate()


def is_ready(port):
    try: return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=1).status_code == 200
    except httpx.HTTPError: return False


def test_a_process_from_start_to_shutdown(process):
    server, port = process(KDCODE_API_KEY="a-secret-key")
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer a-secret-key"}
    second, _ = process(port=port, ready=False, KDCODE_API_KEY="a-secret-key")
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 2 and errors.count("\n") == 1 and "choose another --serve.port" in errors
    assert httpx.post(f"{url}{PATH}", json=request_body()).status_code == 401
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert httpx.post(f"{url}{PATH}", json=request_body(), headers=headers, timeout=300).status_code == 200
    body = request_body(max_tokens=400, stream=True)
    with httpx.stream("POST", f"{url}{PATH}", json=body, headers=headers, timeout=300) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_ready(port))  # new connections fail, the running stream continues
        remaining = [line for line in lines if line.startswith("data: ")]
    assert remaining[-1] == "data: [DONE]"
    assert json.loads(remaining[-2][6:])["choices"][0]["finish_reason"] in ("length", "stop")
    output, errors = server.communicate(timeout=300)
    assert server.returncode == 0 and "a-secret-key" not in output + errors and "Traceback" not in errors, errors


def test_a_public_address_requires_an_api_key(process):
    server, _ = process("--serve.host", "0.0.0.0", ready=False)
    _, errors = server.communicate(timeout=300)
    assert server.returncode == 2 and errors.count("\n") == 1 and "KDCODE_API_KEY" in errors


def test_vllm_gets_the_right_arguments(process, tmp_path):
    (tmp_path/".engines"/"bin").mkdir(parents=True)
    program = tmp_path/".engines"/"bin"/"vllm"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\necho "key=$VLLM_API_KEY"\n')
    program.chmod(0o755)
    server, port = process("--engine", "vllm", "--decode.gamma", "3", ready=False, KDCODE_API_KEY="a-secret-key")
    output, _ = server.communicate(timeout=300)
    arguments = output.splitlines()
    assert arguments[0] == "serve" and arguments[-1] == "key=a-secret-key"
    assert arguments[arguments.index("--port") + 1] == str(port)
    speculation = json.loads(arguments[arguments.index("--speculative-config") + 1])
    assert speculation["num_speculative_tokens"] == 3
    for folder in (speculation["model"], arguments[1]):
        assert os.path.exists(f"{folder}/model.safetensors")
