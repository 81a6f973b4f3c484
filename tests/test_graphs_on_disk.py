"""Compiled steps that an earlier process left on disk: who loads them, and that nothing else is compiled."""
import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_compiled_step import tiny

from kdcode import bench, cli, compiled_step
from kdcode.compiled_step import compile_steps, graph_marker, is_on_disk, load_steps, READY, StepKind
from kdcode.config import Config, DecodeSettings

KINDS = [StepKind(False, 1), StepKind(False, 2)]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Use an empty cache, and a compiler that does nothing; return the models that it was called with."""
    calls = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path/"code"))
    monkeypatch.setattr(compiled_step, "compile_step", lambda model, kind: calls.append(model) or (0., 0.))
    return calls


def test_only_what_is_on_disk_is_loaded(compiled):
    """The second process of a model loads its graphs; a model of which one graph is missing loads none."""
    model, other, lines = tiny(), tiny(num_hidden_layers=1), []
    assert compile_steps(model, KINDS, lines.append) and compile_steps(other, KINDS[:1], lines.append)
    again = [copy.deepcopy(model), copy.deepcopy(other)]
    load_steps({one: KINDS for one in again}, lines.append)
    assert READY[again[0]] == {*KINDS} and again[1] not in READY
    assert [line.split()[0] for line in lines] == ["compiling"] * 3 + ["loading"] * 2


def test_what_the_compiler_could_not_keep_is_not_on_disk(compiled, monkeypatch):
    counters = iter(range(9))
    monkeypatch.setattr(compiled_step, "uncached_graphs", lambda: next(counters))
    model = tiny()
    assert compile_steps(model, KINDS) and not any(is_on_disk(model, kind) for kind in KINDS)


def test_wrong_graph_is_not_on_disk(compiled, monkeypatch):
    monkeypatch.setattr(compiled_step, "compile_step", lambda model, kind: (9., 0.))
    model = tiny()
    with pytest.warns(UserWarning, match="differ by"): assert not compile_steps(model, KINDS)
    assert not any(is_on_disk(model, kind) for kind in KINDS)


def test_unwritable_folder(compiled, monkeypatch, tmp_path):
    (tmp_path/"file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path/"file"))
    model = tiny()
    assert compile_steps(model, KINDS) and not is_on_disk(model, KINDS[0])


def test_marker_names_all_that_code_depends_on(compiled, monkeypatch):
    model = tiny()
    before = graph_marker(model, KINDS[0])
    assert graph_marker(tiny(1), KINDS[0]) == before  # weights are inputs
    others = [graph_marker(tiny(hidden_act="relu"), KINDS[0]), graph_marker(model.bfloat16(), KINDS[0])]
    for name, value in (("processor_hash", lambda: "another"), ("transposed_dtypes", lambda *args: {torch.int8})):
        with mock.patch.object(compiled_step, name, value): others.append(graph_marker(tiny(), KINDS[0]))
    with mock.patch.object(torch, "__version__", "9"): others.append(graph_marker(tiny(), KINDS[0]))
    assert before not in others and len({*others}) == 5


@pytest.mark.parametrize("compile", ["auto", False])
def test_demo_loads_graphs_and_compiles_nothing(compiled, monkeypatch, tmp_path, compile):
    """The teacher's graphs are on disk, its student's are not."""
    teacher, student, seen = SimpleNamespace(model=tiny(), name="tiny"), tiny(num_hidden_layers=1), []
    assert compile_steps(copy.deepcopy(teacher.model), KINDS)
    compiled.clear()
    monkeypatch.setattr(cli, "train_student", lambda *args, **options: (teacher, student))
    monkeypatch.setattr(cli, "run_folder", lambda config: tmp_path)
    monkeypatch.setattr(cli, "print_report", lambda *args: None)
    monkeypatch.setattr(bench, "bench_decode", lambda *args, **options: seen.append(READY.get(teacher.model, set())))
    cli.run_demo(Config(decode=DecodeSettings(compile=compile, student_weights="plain")),
                 SimpleNamespace(command_line="kdcode demo"))
    assert seen == [{*KINDS} if compile else set()] and compiled == ([teacher.model] * 2 if compile else [])
