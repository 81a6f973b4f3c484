"""The server under load: prefix reuse, chunked prefill, cancellations at random, slow clients."""
import asyncio
import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from conftest import step_forms, wait_until
from test_serve import PATH, request_body, solo_text, streamed_text

from kdcode.eagle import EagleStudent
from kdcode.prefix_cache import PrefixCache

FILE = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\nclass Tree:\n"


@pytest.fixture(scope="session")
def eagle_pair(pair):
    """The tiny teacher, and an EAGLE head on its hidden states."""
    torch.manual_seed(0)
    ids = torch.arange(pair[0].model.config.vocab_size)
    head = EagleStudent.from_teacher(pair[0].model, feature_layers=[0, 1, -1], layers=[0], draft_ids=ids).eval()
    for weight in head.parameters():
        if not weight.any(): torch.nn.init.normal_(weight, std=.3)  # a new head ignores the features
    return pair[0], head


def growing_prompts():
    """Sixteen prompts: a file that grows, and the same file with an edit near its end."""
    prompts = [FILE + "".join(f"    x{i} = {i}\n" for i in range(length)) for length in range(0, 16, 2)]
    return prompts + [prompt[:-5] + "y" for prompt in prompts]


def idle(service):
    """Whether the service has no request left."""
    scheduler = service.scheduler
    return not (scheduler.listeners or scheduler.queue or scheduler.batch.sequences or scheduler.batch.new
                or scheduler.batch.decoder)


@pytest.fixture(scope="module", params=["student", "eagle"])
def solo(request, pair, eagle_pair):
    """Both models, greedy and sampled requests, and the texts of their solo runs."""
    models = pair if request.param == "student" else eagle_pair
    requests = [request_body(prompt=prompt, max_tokens=12, temperature=i % 2, seed=i)
                for i, prompt in enumerate(growing_prompts())]
    return models, requests, [solo_text(models, request) for request in requests]


@step_forms("ordinary", "replayed")
@pytest.mark.parametrize("limits", [{}, {"cache_gb": 0.}, {"cache_gb": 2e-4}, {"prefill_chunk": 7}], ids=str)
def test_reused_prefixes_do_not_change_an_answer(step, solo, served, limits):
    """With every size of the pool, and a chunk smaller than the prompts. The solo runs take ordinary steps."""
    models, requests, expected = solo
    with served(models=models, slots=3, **limits) as (client, service), ThreadPoolExecutor(3) as clients:
        for turn in range(2):
            responses = [response.json() for response in clients.map(lambda one: client.post(PATH, json=one), requests)]
            assert [response["choices"][0]["text"] for response in responses] == expected
        cached = [response["usage"]["prompt_tokens_details"]["cached_tokens"] for response in responses]
        prefixes = service.scheduler.batch.prefixes
        assert prefixes.nbytes == sum(entry.nbytes for entry in prefixes.entries) <= prefixes.max_bytes
        wait_until(lambda: idle(service))
    assert len(set(expected)) > 8  # control: different texts
    if limits.get("cache_gb", 1) == 0:
        assert not any(cached)
    elif limits.get("cache_gb", 1) == 1:
        lengths = [response["usage"]["prompt_tokens"] for response in responses]
        assert cached == [length - 2 for length in lengths]  # the whole prompt was sent before


@step_forms("ordinary", "replayed")
def test_a_wrong_prefix_changes_answers(step, pair, served, monkeypatch):
    """The control of the test above: a pool that returns the state of another prefix."""
    requests = [request_body(prompt=f"x{i} = {i}\n" * 9, max_tokens=12) for i in range(4)]

    def find(pool, tokens):
        return (pool.entries[0], min(len(tokens), len(pool.entries[0].tokens))) if pool.entries else (None, 0)
    monkeypatch.setattr(PrefixCache, "find", find)
    with served() as (client, _):
        texts = [client.post(PATH, json=request).json()["choices"][0]["text"] for request in requests]
    assert texts != [solo_text(pair, request) for request in requests]


def test_cached_tokens_of_a_chat_and_of_a_stream(pair, served):
    chat = {"model": "teacher0", "messages": [{"role": "user", "content": "Write a loop."}], "max_tokens": 8}
    with served() as (client, _):
        first = client.post("/v1/chat/completions", json=chat).json()
        answer = first["choices"][0]["message"]
        longer = chat | {"messages": [*chat["messages"], answer, {"role": "user", "content": "And a test."}],
                         "stream": True, "stream_options": {"include_usage": True}}
        streamed = client.post("/v1/chat/completions", json=longer).text
        metrics = client.get("/metrics").text
    usage = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")][-1]["usage"]
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] - 2 <= cached < usage["prompt_tokens"] - 2
    assert f"kdcode_cached_prompt_tokens_total {cached}.0" in metrics and "kdcode_prefix_cache_bytes" in metrics


def test_running_streams_go_on_while_a_long_prompt_is_read(pair, served):
    """Between two parts of the long prompt, the running sequence gets a step."""
    with served(prefill_chunk=16) as (client, service):
        batch, steps = service.scheduler.batch, []
        original = batch.prefill

        def prefill():
            steps.append([len(sequence.tokens) for sequence in batch.sequences])
            return original()
        batch.prefill = prefill
        with ThreadPoolExecutor(2) as clients:
            running = clients.submit(client.post, PATH, json=request_body(max_tokens=300, speculation={"gamma": 0}))
            wait_until(lambda: batch.sequences)
            steps.clear()
            prompt = list(range(10, 410))
            response = clients.submit(client.post, PATH, json=request_body(prompt=prompt, max_tokens=2)).result()
            assert response.status_code == running.result().status_code == 200
    lengths = [step[0] for step in steps if step]
    assert len(lengths) >= 400//16 and all(b > a for a, b in zip(lengths[:20], lengths[1:21])), lengths


@step_forms("ordinary", "static")
def test_200_concurrent_requests_equal_their_solo_runs(step, pair, served):
    different = [request_body(prompt=prompt, max_tokens=4 + i % 9, temperature=i // 2 % 2, seed=i)
                 for i, prompt in enumerate(growing_prompts())]
    requests = [different[i % 16] for i in range(200)]
    expected = {json.dumps(request): solo_text(pair, request) for request in requests}

    async def send_all(url):
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            async def send(i):
                response = await client.post(PATH, json=requests[i] | {"stream": i % 3 == 0})
                assert response.status_code == 200, response.text
                return streamed_text(response) if i % 3 == 0 else response.json()["choices"][0]["text"]
            return await asyncio.gather(*map(send, range(200)))

    with served(queue_size=200) as (client, service):
        texts = asyncio.run(send_all(str(client.base_url)))
        wait_until(lambda: idle(service))
    assert texts == [expected[json.dumps(request)] for request in requests]


async def cancel_at_random(url, count, clients, seed):
    """Send requests and cancel each after a random time, some before the first byte; return how many were complete."""
    generator = random.Random(seed)
    limits, gate = httpx.Limits(max_connections=clients), asyncio.Semaphore(clients)
    prompts = growing_prompts()

    async def send(client, i):
        body = request_body(prompt=prompts[i % 16], max_tokens=60, stream=bool(i % 2), temperature=i % 3 / 2, seed=i)
        async with gate:
            try:
                async with asyncio.timeout(generator.expovariate(20)):
                    response = await client.post(PATH, json=body)
                    return response.status_code == 200
            except TimeoutError:
                return False

    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return sum(await asyncio.gather(*(send(client, i) for i in range(count))))


@step_forms("ordinary", "static", "replayed")
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_cancelled_requests_leave_nothing(step, pair, served, count):
    """No slot, no task, no cache beyond the pool's limit; and the server still answers."""
    with served(slots=4, queue_size=64, cache_gb=1e-3, prefill_chunk=8) as (client, service):
        complete = asyncio.run(cancel_at_random(str(client.base_url), count, clients=16, seed=0))
        wait_until(lambda: idle(service))
        prefixes = service.scheduler.batch.prefixes
        assert prefixes.nbytes == sum(entry.nbytes for entry in prefixes.entries) <= 1e6
        request = request_body(prompt=growing_prompts()[3])
        assert client.post(PATH, json=request).json()["choices"][0]["text"] == solo_text(pair, request)
        lines = client.get("/metrics").text
    assert complete < count  # control: some were cancelled
    for name in ("running_requests", "waiting_requests"): assert f"kdcode_{name} 0.0" in lines
    assert threading.active_count() < 40


def test_a_client_that_reads_slowly_does_not_stall_the_others(pair, served):
    """It reads one byte, and then waits until the other clients have their answers."""
    with served(slots=2) as (client, service):
        content = json.dumps(request_body(max_tokens=200, stream=True, logprobs=5, speculation={"details": True}))
        header = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
                  f"Content-Length: {len(content)}"]
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            slow.connect((client.base_url.host, client.base_url.port))
            slow.sendall("\r\n".join([*header, "", content]).encode())
            assert slow.recv(1) == b"H"
            request = request_body(max_tokens=30)
            texts = [client.post(PATH, json=request).json()["choices"][0]["text"] for _ in range(3)]
            assert texts == [solo_text(pair, request)] * 3
            wait_until(lambda: not service.scheduler.listeners)  # decoded to the end, although nobody reads it
            assert slow.recv(1) == b"T"
        wait_until(lambda: idle(service))


PENALTIES = [{"logit_bias": {"500": 8, "20": -100}}, {"frequency_penalty": 1.5}, {"presence_penalty": -2},
             {"frequency_penalty": .7, "presence_penalty": .4, "logit_bias": {"42": 3.5}}]


@step_forms("ordinary", "static")
@pytest.mark.parametrize("fields", PENALTIES, ids=str)
def test_penalties_are_exact_under_drafting(step, pair, served, fields):
    """Greedy text with drafts equals a loop without drafts that adds the penalties to the logits itself."""
    teacher, tokens = pair[0], pair[0].tokenizer(FILE).input_ids
    prompt_length, bias = len(tokens), fields.get("logit_bias", {})
    for _ in range(25):
        with torch.no_grad(): logits = teacher.model(torch.tensor([tokens])).logits[0, -1].clone()
        for token, value in bias.items(): logits[int(token)] += value
        for token in set(tokens[prompt_length:]):
            count = tokens[prompt_length:].count(token)
            logits[token] -= fields.get("frequency_penalty", 0) * count + fields.get("presence_penalty", 0)
        tokens = [*tokens, int(logits.argmax())]
    expected = teacher.tokenizer.decode(tokens[prompt_length:])
    request = request_body(prompt=FILE, max_tokens=25)
    with served() as (client, _):
        found = client.post(PATH, json=request | fields).json()
        plain = client.post(PATH, json=request).json()
    assert found["choices"][0]["text"] == expected
    assert sum(found["speculation"]["statistics"]["drafted"]) > 0
    assert plain["choices"][0]["text"] != expected  # control: the fields change the text


def test_echo_begins_with_the_prompt(pair, served):
    request = request_body(prompt=["def f(n):", "import"], echo=True)
    with served() as (client, _):
        refused = client.post(PATH, json=request | {"logprobs": 1})
        choices = client.post(PATH, json=request).json()["choices"]
        streamed = streamed_text(client.post(PATH, json=request | {"prompt": "import", "stream": True}))
    expected = [prompt + solo_text(pair, request | {"prompt": prompt, "seed": 0}) for prompt in request["prompt"]]
    assert [choice["text"] for choice in choices] == expected and streamed == expected[1]
    assert refused.status_code == 400 and "echo with logprobs" in refused.json()["error"]["message"]


def test_a_model_without_infilling_tokens_says_so(pair, served):
    with served() as (client, _):
        for response in (client.post(PATH, json=request_body(suffix="}")),
                         client.post("/infill", json={"input_prefix": "def f(", "input_suffix": ")"})):
            assert response.status_code == 400
            assert "no fill-in-the-middle tokens" in response.json()["error"]["message"]
        plain = client.post(PATH, json=request_body(suffix=""))
        assert plain.json()["choices"][0]["text"] == solo_text(pair, request_body(seed=0))
