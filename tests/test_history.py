"""The table of results: it holds every report that is committed, and every one that git remembers."""
from pathlib import Path

import pandas as pd
import pytest

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
    pd.testing.assert_frame_equal(join_rows(history, rows), history)  # else: kdcode record


def test_table_is_sorted_and_whole(history, tmp_path):
    write_history(join_rows(history, []), tmp_path/"history.csv")
    assert (tmp_path/"history.csv").read_bytes() == (RESULTS/"history.csv").read_bytes()


@pytest.mark.skipif(not (ROOT/".git").exists(), reason="no repository")
def test_table_holds_what_git_remembers(history):
    rows = from_git(ROOT).to_dict("records")
    pd.testing.assert_frame_equal(join_rows(history, rows), history)
