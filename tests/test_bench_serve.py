"""`kdcode bench serve` beside vLLM and llama.cpp: fake engines that stream as the real ones do."""
import asyncio
import json

import httpx
import pytest

from fake_engine import entries, install, option
from kdcode import bench_serve
from kdcode.bench_serve import JSON_TOKENS, JsonClients, Load, measure_engine, Prompts, SCHEMA, ServerBenchmark
from kdcode.config import Config
from kdcode.engines import method_name, run_server
from kdcode.files import PROGRAMS


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
    """The report has kdcode's figures, and a line for each server."""
    install(tmp_path, "vLLM", "does-not-start")
    install(tmp_path, "llama.cpp", "does-not-answer")
    report, text = bench()
    assert all(list(row) == ["measured", "kdcode"] for row in report["rows"]) and report["figures"]["lost"] == 0
    lines = [line for line in text.splitlines() if "was not measured" in line]
    assert [line.partition(" was not measured: ")[0] for line in lines] == [
        method_name(engine, drafting) for engine in PROGRAMS for drafting in (False, True)]
    for line in lines[:2]: assert " was not measured: vllm has exited; " in line and "no such model." in line
    for line in lines[2:]: assert " was not measured: no request got a complete answer; " in line
    assert lines[2].endswith("llama.cpp-without-drafting.log.") and lines[3].endswith("llama.cpp,-student-draft.log.")


def test_an_export_that_fails_is_named(pair, tmp_path, monkeypatch):
    """What was measured before stays: the disk may fill up after kdcode's own measurement."""
    def fill_the_disk(*arguments): raise OSError(28, "No space left on device")
    monkeypatch.setattr(bench_serve, "engine_files", fill_the_disk)
    benchmark = ServerBenchmark(pair[0], Load(), [256], [])
    assert measure_engine(benchmark, "vLLM", pair[1], Config(), tmp_path) == [
        "vLLM was not measured: [Errno 28] No space left on device."]


def test_a_draft_is_measured_if_the_engine_fails_without_it(pair, tmp_path, monkeypatch):
    """Here the system refuses to start the program, which is not a mistake in the configuration."""
    tried = []

    def start(engine, command, log):
        tried.append(log.name)
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(bench_serve, "run_engine", start)
    monkeypatch.setenv("KDCODE_HOME", str(tmp_path))
    install(tmp_path, "vLLM")
    notes = measure_engine(ServerBenchmark(pair[0], Load(), [256], []), "vLLM", pair[1], Config(), tmp_path)
    assert tried == ["vLLM-without-drafting.log", "vLLM,-student-draft.log"]
    assert notes == [f"{method_name('vLLM', drafting)} was not measured: [Errno 13] Permission denied."
                     for drafting in (False, True)]


def test_without_engines_the_benchmark_loses_no_request(bench, tmp_path):
    report, text = bench()
    assert (tmp_path/"runs"/"load"/"bench-serve"/"serve.png").exists()
    assert [line for line in text.splitlines() if "was not measured" in line] == [
        f"{engine} was not measured: it is not installed (make engines)." for engine in PROGRAMS]
    wanted = {"tokens_per_second_1", "tokens_per_second_8", "ttft_p50", "ttft_resent_p50", "itl_p50",
              "itl_p95_with_long_prompt", "lost"}
    assert wanted <= set(report["figures"]) and report["figures"]["lost"] == 0
