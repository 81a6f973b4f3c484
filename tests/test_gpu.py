"""The script of `make test-gpu`, with tiny models on the CPU."""
import json
import os
import subprocess
import sys

import pytest

import gpu
from conftest import OFFLINE, ROOT
from kdcode.history import record

SMALL = ("--device", "cpu", "--small")
MODELS = ("SmolLM2-135M shape, bf16, tiny", "CodeLlama-7b shape, NF4, tiny")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a report with every part, measured in a new process with time limits for slow machines."""
    folder = tmp_path_factory.mktemp("gpu")/"report"
    command = [sys.executable, ROOT/"tests"/"gpu.py", "--out", folder, *SMALL, "--seconds", "9000"]
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_every_part_is_measured(measured):
    figures = json.loads((measured/"report.json").read_text())["figures"]
    names = ["one-token step, eager", "one-token step, graphs", "t(8), head, graphs", "c, draft step / target step",
             "v, call over 5 tokens / one token", "generate", "kdcode without drafting", "kdcode, head, α = 0.8"]
    assert all(figures[f"{name}, {model}"] > 0 for name in names for model in MODELS)
    assert all(figures[f"training, {name}: speed, {MODELS[1]}"] > 0 for name in ("three layers", "slim head"))
    assert figures[f"compiling the target, one row, one token, {MODELS[0]}"] > 0
    for model in MODELS:
        low, high = (figures[f"kdcode, head, α = {rate}: accepted, {model}"] for rate in (.6, .8))
        assert low < high


@pytest.mark.slow
def test_report_can_be_recorded(measured, tmp_path):
    assert record(measured, tmp_path, "gpu-card") > 50
    assert "failed" not in (tmp_path/"gpu-card"/"report.md").read_text()


def test_part_that_takes_too_long_is_one_line(tmp_path, capsys):
    assert gpu.main([*SMALL, "--model", "smollm2", "--seconds", "0", "--out", str(tmp_path)]) == 1
    report = (tmp_path/"report.md").read_text()
    assert f"\n\n{MODELS[0]}: model failed: it took longer than its 0 s\n\n" in report
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_failures_are_lines_and_keep_the_other_parts(tmp_path):
    found = gpu.Measurements("command", gpu.Config(), tmp_path, end=float("inf"))
    found.run("first", 60, lambda: found.add("model", "speed", 2, "tokens/s"))
    found.run("second", 60, lambda: 1 / 0)
    found.run("third", 60, lambda: found.add("model", "memory", 3, "GiB"))
    report = json.loads((tmp_path/"report.json").read_text())
    assert (report["figures"]["speed, model"], report["figures"]["memory, model"]) == (2, 3)
    assert "\n\nsecond failed: ZeroDivisionError: division by zero\n\n" in (tmp_path/"report.md").read_text()


class WrongModel(gpu.CompiledModel):
    """Processes other tokens than the given ones."""
    def forward(self, tokens, *others): return super().forward([[id // 2 for id in row] for row in tokens], *others)


def test_wrong_texts_and_wrong_graphs_are_found(tmp_path, monkeypatch):
    """Negative controls: another text than the expected one, and a step of other tokens."""
    device, found = gpu.torch.device("cpu"), gpu.Measurements("command", gpu.Config(), tmp_path, end=float("inf"))
    parts = gpu.ModelParts(gpu.small(gpu.SHAPES["smollm2"], device), device, True, found)
    parts.make_model()
    parts.make_head()
    parts.correctness()
    parts.decoding()
    assert found.notes == []
    parts.text = parts.text[:20] + parts.text[21:]
    parts.decoding()
    assert len(found.notes) == 5 and all("are wrong" in note for note in found.notes)
    monkeypatch.setattr(gpu, "CompiledModel", WrongModel)
    parts.correctness()
    assert found.notes[5:] == [f"{MODELS[0]}: the graphs differ from the eager step."] and found.failures == 6


def test_machine_without_the_device_gets_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^test-gpu: PyTorch finds no cuda:99 device, so nothing was measured; run"):
        gpu.main(["--device", "cuda:99", "--out", str(tmp_path/"report")])
    assert not (tmp_path/"report").exists()
