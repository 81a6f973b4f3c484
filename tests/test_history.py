"""results/history.csv holds every committed report, and every report in git's history."""
import json
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from kdcode.cli import parse
from kdcode.history import from_git, join_rows, read_history, read_report, report_rows, write_history

ROOT = Path(__file__).parent.parent
RESULTS = ROOT/"results"
NAMES = sorted(path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("report.json"))


@pytest.fixture(scope="module")
def history(): return read_history(RESULTS/"history.csv")


@pytest.mark.parametrize("name", NAMES)
def test_report_has_its_rows(history, name):
    rows = report_rows(read_report(RESULTS, name), name)
    assert rows
    pd.testing.assert_frame_equal(join_rows(history, rows), history)  # if not: kdcode record


def test_table_is_sorted_and_complete(history, tmp_path):
    write_history(join_rows(history, []), tmp_path/"history.csv")
    assert (tmp_path/"history.csv").read_bytes() == (RESULTS/"history.csv").read_bytes()


@pytest.mark.skipif(not (ROOT/".git").exists(), reason="no repository")
def test_table_holds_the_reports_of_all_commits(history):
    """By date and value: figures and results were renamed once."""
    known = {date: sorted(rows["value"]) for date, rows in history.groupby("date")}
    for date, rows in from_git(ROOT).groupby("date"):
        values = sorted(set(rows["value"]))
        assert date in known and not set(values) - set(known[date]), date


@pytest.mark.skipif(not (ROOT/".git").exists(), reason="no repository")
def test_a_page_quotes_each_kept_report():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [file for file in done.stdout.splitlines() if (ROOT/file).is_file()]
    pages = [file for file in listed if not file.startswith("results/") and file.endswith((".ipynb", ".md", ".py"))]
    text = "\n".join((ROOT/page).read_text() for page in pages).replace('\\"', '"').replace('"/"', "/")
    kept = [name for name in NAMES if f"results/{name}/report.json" in listed]
    assert kept and [name for name in kept if not re.search(rf"""["/]{name}["/]""", text)] == []


def flat(settings: dict, above: str = "") -> dict:
    """Return each setting by its full name; a mix of divergences is one setting."""
    rows = {}
    for key, value in settings.items():
        section = isinstance(value, dict) and key != "divergence"
        rows |= flat(value, f"{above}{key}.") if section else {above + key: value}
    return rows


# name and folder do not change a result; "auto" also decodes an int8 draft in int8; `threads` is no setting of training
OF_NO_EFFECT = {"name", "out", "decode.student_weights", "decode.compile", "train.threads", "threads"}
# settings changed since: decode-all measured the first shipped draft, and pages that quote it say so
SMALLER_DEMO = {"data.tokens", "train.eval_steps"}  # make demo trains on half the text now
SINCE = {
    "decode": SMALLER_DEMO,
    "decode-sampled": SMALLER_DEMO,
    "experiments/size": {"train.epochs"},  # max_steps was no maximum
    "decode-all": {"data.source", "data.tokens", "student.layers", "train.epochs", "train.eval_steps",
                   "train.single_step_share", "train.save_dtype"},
    "targets": {"loss.chunk_size", "decode.gamma", "data.tokens"},
    "training-smollm2-draft": {"decode.gamma"},
    "training-smollm2-independent": {"decode.gamma", "train.single_step_share"},  # trained for one step
}


@pytest.mark.parametrize("name", NAMES)
def test_command_of_report_gives_the_same_configuration(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    report = read_report(RESULTS, name)
    program, *arguments = shlex.split(report["command"])
    if program != "kdcode":
        assert (ROOT/arguments[0]).is_file()
        return
    _, config, _ = parse(arguments)
    now, then = flat(json.loads(json.dumps(asdict(config)))), flat(report["config"])
    assert {key for key in then if now.get(key) != then[key]} - OF_NO_EFFECT == SINCE.get(name, set())
