"""The table of results: it holds every report that is committed, and every one that git remembers."""
import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from kdcode.cli import parse
from kdcode.history import from_git, join_rows, read_history, report_rows, write_history
from kdcode.hub import read_report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT/"results"
NAMES = sorted(path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("report.json"))


@pytest.fixture(scope="module")
def history(): return read_history(RESULTS/"history.csv")


@pytest.mark.parametrize("name", NAMES)
def test_report_has_its_rows(history, name):
    rows = report_rows(read_report(RESULTS, name), name)
    assert rows
    pd.testing.assert_frame_equal(join_rows(history, rows), history)  # else: kdcode record


def test_table_is_sorted_and_whole(history, tmp_path):
    write_history(join_rows(history, []), tmp_path/"history.csv")
    assert (tmp_path/"history.csv").read_bytes() == (RESULTS/"history.csv").read_bytes()


@pytest.mark.skipif(not (ROOT/".git").exists(), reason="no repository")
def test_table_holds_what_git_remembers(history):
    rows = from_git(ROOT).to_dict("records")
    pd.testing.assert_frame_equal(join_rows(history, rows), history)


def flat(settings: dict, above: str = "") -> dict:
    """Each setting by its whole name; a mix of divergences is one setting."""
    rows = {}
    for key, value in settings.items():
        rows |= flat(value, f"{above}{key}.") if isinstance(value, dict) and key != "divergence" else {above + key: value}
    return rows


RENAMED = {"configs/smollm2-alone-draft.yaml": "configs/smollm2-independent.yaml"}
# the name and the folder of a run change nothing; a draft saved in 8 bits is read in them by "auto" too
OF_NO_EFFECT = {"name", "out", "decode.student_weights"}
# what configurations have come to say since: decode-all is of the first shipped draft, and says so where it is quoted
SINCE = {
    "decode-all": {"data.source", "data.tokens", "student.layers", "train.epochs", "train.eval_steps", "train.single_step_share", "train.save_dtype"},
    "targets": {"loss.chunk_size", "decode.gamma"},  # the sizes of batches and drafts are the command's own there
    "training-smollm2-draft": {"decode.gamma"},
    "training-smollm2-independent": {"decode.gamma", "train.single_step_share"},  # it drafts in one step
}


@pytest.mark.parametrize("name", NAMES)
def test_command_of_report_asks_for_the_same_today(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    report = read_report(RESULTS, name)
    program, *arguments = shlex.split(report["command"])
    if program != "kdcode":
        assert (ROOT/arguments[0]).is_file()
        return
    _, config, _ = parse([RENAMED.get(word, word) for word in arguments])
    now, then = flat(json.loads(json.dumps(asdict(config)))), flat(report["config"])
    assert {key for key in then if now.get(key) != then[key]} - OF_NO_EFFECT == SINCE.get(name, set())
