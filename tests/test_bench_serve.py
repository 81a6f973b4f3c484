"""`kdcode bench serve` beside vLLM and llama.cpp: fake engines that stream as the real ones do."""
import asyncio
import json
import stat
import sys

import httpx
import pytest

from kdcode.bench_serve import JSON_TOKENS, JsonClients, Load, Prompts, SCHEMA
from kdcode.engines import run_server
from kdcode.files import PROGRAMS

# Each answers after 50 ms: one token, and then steps of one token, or of two with a draft. vLLM sends an event for each
# step, llama.cpp one for each token, with the number after the step. Both count only if the request asks for it.
FAKE_ENGINE = """#!PYTHON
import http.server, json, os, sys, time
name, words = sys.argv[0], sys.argv[1:]
is_vllm = os.path.basename(name) == "vllm"
drafting = ("--speculative-config" if is_vllm else "--model-draft") in words
log = os.open(name + ".log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
def record(entry): os.write(log, (json.dumps(entry) + chr(10)).encode())
record({"arguments": words})
if os.path.exists(name + ".does-not-start"): sys.exit("no such model")

def count(done, body):
    if is_vllm: return {"usage": {"completion_tokens": done}} if body.get("stream_options") == {
        "include_usage": True, "continuous_usage_stats": True} else {}
    return {"timings": {"predicted_n": done}} if body.get("timings_per_token") is True else {}

def events(body):
    if "messages" in body: yield {"choices": [{"delta": {"role": "assistant", "content": "" if is_vllm else None}}]}
    done = 0
    while done < body["max_tokens"]:
        step = min(2 if drafting and done else 1, body["max_tokens"] - done)
        done += step
        for text in ["ab"[:step]] if is_vllm else "ab"[:step]:
            choice = {"delta": {"content": text}} if "messages" in body else {"text": text}
            yield {"choices": [choice]} | count(done, body)
            if body.get("prompt") == [13]: yield {"error": {"message": "out of memory"}}
    if is_vllm: yield {"choices": []} | count(done, body)

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words): pass
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        record({"path": self.path, "body": body})
        if os.path.exists(name + ".does-not-answer"): return self.send_error(500)
        time.sleep(.05)
        self.send_response(200)
        self.end_headers()
        for event in [*map(json.dumps, events(body)), "[DONE]"]: self.wfile.write(f"data: {event}\\n\\n".encode())

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # more than the clients; a full queue loses connections
Server(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


def install(folder, engine, fault=""):
    """Write a fake engine where `make engines` installs the real one, and return its path."""
    program = folder/".engines"/"bin"/PROGRAMS[engine]
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(FAKE_ENGINE.replace("PYTHON", sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    if fault: program.with_name(f"{program.name}.{fault}").touch()
    return program


def entries(program):
    """What a fake engine has recorded, in one list for each of its starts."""
    starts = []
    for line in program.with_name(program.name + ".log").read_text().splitlines():
        entry = json.loads(line)
        if "arguments" in entry: starts.append([])
        starts[-1].append(entry)
    return starts


def option(start, name):
    """The value of an option in the command that started a fake engine."""
    words = start[0]["arguments"]
    return words[words.index(name) + 1]


@pytest.mark.parametrize(("engine", "word", "counts"), [
    ("vLLM", "--none", [1, 1, 1, 1, 1, 1]), ("vLLM", "--speculative-config", [1, 2, 2, 1]),
    ("llama.cpp", "--none", [1, 1, 1, 1, 1, 1]), ("llama.cpp", "--model-draft", [1, 2, 2, 1])])
def test_tokens_are_counted_as_the_engine_counts_them(engine, word, counts, pair, tmp_path):
    """Steps of several tokens arrive at once, in one event or in several."""
    program = install(tmp_path, engine)

    async def ask(url):
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            clients = JsonClients(client, "teacher", Prompts(pair[0], 5000), Load(repeats=1, new_tokens=6), engine)
            prompts = [1, 2], [{"role": "user", "content": "Hello"}], [13]
            return [await clients.ask(prompt, 6) for prompt in prompts], await clients.structured(16)

    with run_server([str(program), word, "x"], {}, tmp_path/"log") as url:
        (completion, chat, broken), (free, constrained, valid) = asyncio.run(ask(url))
    for answer in completion, chat:
        assert [count for _, count in answer.events] == counts
        assert answer.complete and answer.tokens == len(answer.text) == 6
        assert answer.first_token >= .05 and len(answer.between_tokens()) == 5
    assert (broken.complete, broken.tokens) == (False, 1)  # an error in the stream, which goes on to its end
    assert (len(free), len(constrained), valid) == (5, JSON_TOKENS - 1, [False])
    [start] = entries(program)
    assert [entry["path"] for entry in start[1:3]] == ["/v1/completions", "/v1/chat/completions"]
    assert start[1]["body"]["prompt"] == [1, 2]
    body = start[-1]["body"]
    assert (body["response_format"]["json_schema"]["schema"] if engine == "vLLM" else body["json_schema"]) == SCHEMA


@pytest.fixture
def bench(pair, kdcode, tiny_teacher, tmp_path):
    """Run the command with three new tokens, and return its report and the text of it. No engine is on the PATH."""
    def run():
        pair[1].save_pretrained(tmp_path/"pair")
        process = kdcode("bench", "serve", "--teacher.name", tiny_teacher, "--draft", tmp_path/"pair", "--name", "load",
                         "--decode.problems", 1, "--decode.max_new_tokens", 3, "--decode.compile", "off",
                         "--decode.gamma", 4, "--serve.slots", 5, PATH="")
        assert process.returncode == 0, process.stderr
        folder = tmp_path/"runs"/"load"/"bench-serve"
        return json.loads((folder/"report.json").read_text()), (folder/"report.md").read_text()
    return run


def test_the_engines_get_the_same_load(bench, tmp_path):
    """With and without the draft: the same prompts, a column each, and figures that their waiting time bounds."""
    programs = [install(tmp_path, engine) for engine in PROGRAMS]
    report, text = bench()
    engines = [f"{engine}{draft}" for engine in PROGRAMS for draft in (" without drafting", ", student draft")]
    rows = {row.pop("measured"): row for row in report["rows"]}
    assert all(list(row) == ["kdcode", *engines] for row in rows.values())
    assert rows["lost requests"] == dict.fromkeys(["kdcode", *engines], 0)
    assert len(set(rows["requests"].values())) == 1

    starts = [start for program in programs for start in entries(program)]
    sent = [sorted(json.dumps(entry["body"]["prompt"]) for entry in start[1:] if "prompt" in entry["body"])
            for start in starts]
    assert sent[0] == sent[1] == sent[2] == sent[3]
    assert [len(start) - 2 for start in starts] == list(rows["requests"].values())[1:]  # command and warm-up
    assert [len(json.loads(prompt)) for prompt in sent[0]].count(256) >= 31
    assert [option(start, "--max-num-seqs") for start in starts[:2]] == ["5", "5"]
    assert [option(start, "--ctx-size") for start in starts[2:]] == [str(5 * 512)] * 2  # the teacher's context
    assert json.loads(option(starts[1], "--speculative-config"))["num_speculative_tokens"] == 4
    assert option(starts[3], "--spec-draft-n-max") == "4"
    assert "--no-enable-prefix-caching" not in starts[0][0]["arguments"]

    figures = report["figures"]
    for label in engines:
        assert 0 < figures[f"tokens_per_second_1, {label}"] <= 3 / .05
        assert figures[f"ttft_p50, {label}"] >= 50 and figures[f"ttft_resent_p50, {label}"] >= 50
        assert figures[f"json_valid, {label}"] == 0 < figures[f"itl_p50, {label}"]
    assert figures["json_valid"] == 1 and "was not measured" not in text


def test_an_engine_that_fails_is_named(bench, tmp_path):
    """The report has kdcode's figures, and a line for each engine."""
    install(tmp_path, "vLLM", "does-not-start")
    install(tmp_path, "llama.cpp", "does-not-answer")
    report, text = bench()
    assert all(list(row) == ["measured", "kdcode"] for row in report["rows"]) and report["figures"]["lost"] == 0
    vllm, llama_cpp = [line for line in text.splitlines() if "was not measured" in line]
    assert vllm.startswith("vLLM without drafting was not measured: vllm has exited; ") and "no such model." in vllm
    assert llama_cpp.startswith("llama.cpp without drafting was not measured: no request got a complete answer; ")
    assert llama_cpp.endswith("llama.cpp-without-drafting.log.")


def test_without_engines_the_benchmark_loses_no_request(bench, tmp_path):
    report, text = bench()
    assert (tmp_path/"runs"/"load"/"bench-serve"/"serve.png").exists()
    assert [line for line in text.splitlines() if "was not measured" in line] == [
        f"{engine} was not measured: it is not installed (make engines)." for engine in PROGRAMS]
    wanted = {"tokens_per_second_1", "tokens_per_second_8", "ttft_p50", "ttft_resent_p50", "itl_p50",
              "itl_p95_with_long_prompt", "lost"}
    assert wanted <= set(report["figures"]) and report["figures"]["lost"] == 0
