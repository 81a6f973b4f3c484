"""`kdcode bench engines` beside vLLM and llama.cpp that fail: the others are measured all the same."""
from dataclasses import replace

import pytest

from fake_engine import entries, install, option
from kdcode import engines
from kdcode.bench import GENERATE, STUDENT_DRAFT
from kdcode.config import Config, ConfigError, DecodeSettings, TeacherSettings
from kdcode.data import humaneval_problems
from kdcode.decode import prompt_ids
from kdcode.engines import bench_engines, method_name
from kdcode.files import PROGRAMS

SETTINGS = DecodeSettings(problems=3, max_new_tokens=3, gamma=2, adaptive=False, compile=False)


@pytest.fixture
def bench(pair, tmp_path, monkeypatch):
    """Run the benchmark, and return its report and the notes on what was not measured. No engine is on the PATH."""
    monkeypatch.setenv("KDCODE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")

    def run(**changes):
        config = Config(teacher=TeacherSettings(name=pair[0].name), decode=replace(SETTINGS, **changes))
        report = bench_engines(*pair, config, tmp_path, "kdcode bench engines")
        return report, [note for note in report.notes if "was not measured" in note]
    return run


@pytest.mark.parametrize(("fault", "requests", "reason"), [
    ("does-not-start", 0, "vllm has exited; "),
    ("fails-later", 3, "prompt 2 failed (HTTPError: HTTP Error 500: ")])  # the first request warms up
def test_an_engine_that_fails_costs_its_own_row(fault, requests, reason, bench, tmp_path):
    """The same engine without the draft, the other engine, kdcode and transformers have theirs."""
    vllm = install(tmp_path, "vLLM", fault, "--speculative-config")
    install(tmp_path, "llama.cpp")
    report, [note] = bench()
    assert note.startswith(f"vLLM, student draft was not measured: {reason}")
    methods = {row["method"] for row in report.rows}
    assert methods >= {GENERATE, STUDENT_DRAFT, "vLLM without drafting", "llama.cpp without drafting",
                       "llama.cpp, student draft"}
    assert "vLLM, student draft" not in methods and "vllm_speedup" not in report.figures
    assert report.figures["llama_cpp_speedup"] > 0 and (tmp_path/"report.md").exists()
    sent = sum(len(start) - 1 for start in entries(vllm))  # without the command
    assert sent == 1 + SETTINGS.problems + requests


@pytest.mark.parametrize("fault", ["does-not-start", "does-not-answer"])
def test_without_any_engine_the_others_are_measured(fault, bench, tmp_path):
    for engine in PROGRAMS: install(tmp_path, engine, fault)
    report, notes = bench()
    assert [note.partition(" was not measured: ")[0] for note in notes] == [
        method_name(engine, drafting) for engine in PROGRAMS for drafting in (False, True)]
    assert {GENERATE, STUDENT_DRAFT} <= {row["method"] for row in report.rows}


def test_an_export_that_fails_is_named(bench, tmp_path, monkeypatch):
    def fill_the_disk(*arguments): raise OSError(28, "No space left on device")
    monkeypatch.setattr(engines, "engine_files", fill_the_disk)
    for engine in PROGRAMS: install(tmp_path, engine)
    report, notes = bench()
    assert notes == [f"{engine} was not measured: [Errno 28] No space left on device." for engine in PROGRAMS]
    assert {GENERATE, STUDENT_DRAFT} <= {row["method"] for row in report.rows}


def test_the_context_is_that_of_the_longest_answer(bench, pair, tmp_path):
    """Not the engine's default, which is longer than a small teacher's context and shorter than a long answer."""
    vllm, llama_cpp = [install(tmp_path, engine) for engine in PROGRAMS]
    bench()
    longest = max(len(prompt_ids(pair[0], problem["prompt"])) for problem in humaneval_problems(SETTINGS.problems))
    expected = [str(longest + SETTINGS.max_new_tokens + 1 + SETTINGS.gamma)] * 2
    assert [option(start, "--max-model-len") for start in entries(vllm)] == expected
    assert [option(start, "--ctx-size") for start in entries(llama_cpp)] == expected


def test_an_answer_longer_than_the_context_starts_nothing(bench, tmp_path):
    vllm = install(tmp_path, "vLLM")
    with pytest.raises(ConfigError, match="decode.max_new_tokens is 512, but the context of .* has 512 tokens"):
        bench(max_new_tokens=512)
    assert not vllm.with_name("vllm.log").exists()
