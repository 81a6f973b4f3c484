"""`kdcode eval` on the command line: a table, a second call that measures nothing again, one-line errors."""
import json

import pytest

SMALL = ["--decode.compile", "off", "--eval.limit", 3, "--eval.lines", 2, "--eval.documents", 2,
         "--eval.max_new_tokens", 8,
         "--eval.prompt", "plain", "--decode.problems", 1, "--decode.adaptive", "false", "--decode.max_new_tokens", 8]


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory):
    """A folder with a student of the tiny teacher."""
    from kdcode.data import tokenizer_fingerprint
    from kdcode.student import Student
    from kdcode.teacher import load_teacher
    teacher, folder = load_teacher(str(tiny_teacher)), tmp_path_factory.mktemp("student")
    made = Student.from_teacher(teacher.model, layers=[0])
    made.config.update({"teacher": teacher.name, "tokenizer_fingerprint": tokenizer_fingerprint(teacher.tokenizer)})
    made.save_pretrained(folder)
    return folder


def read_rows(folder):
    """Return the rows of the report."""
    return json.loads((folder/"report.json").read_text())["rows"]


def test_model_comparison(kdcode, tiny_teacher, student, tmp_path):
    words = ("eval", "--name", "trial", "--teacher.name", tiny_teacher, "--models", student, "--draft", student,
             "--unsafe", *SMALL)
    done = kdcode(*words)
    assert done.returncode == 0, done.stderr
    folder = tmp_path/"runs"/"trial"/"eval"
    rows = read_rows(folder)
    teacher, by_itself, drafted = rows
    assert [row["model"] for row in rows] == [str(tiny_teacher), str(student), f"{tiny_teacher} with {student}"]
    assert teacher["bits per byte"] > 0
    assert teacher["acceptance rate as draft"] is None and 0 <= by_itself["acceptance rate as draft"] <= 1
    assert by_itself["tokens per target call"] >= 1
    assert drafted["pass@1"] == teacher["pass@1"] == 0
    assert "With the draft, 3 of 3 programs are the same as without it." in done.stdout
    assert "Programs ran without isolation" in done.stdout
    assert (folder/"models.png").stat().st_size > 0
    programs = [json.loads(line) for file in folder.glob("*/programs.jsonl") for line in file.read_text().splitlines()]
    assert len(programs) == 9 and all({"task_id", "outcome", "program"} == set(row) for row in programs)

    texts = next(folder.glob("*/texts.jsonl"))  # as after an interruption while texts were written
    before = texts.read_text()
    modified = {file: file.stat().st_mtime_ns for file in folder.glob("*/*.json")}
    texts.with_name("programs.json").unlink()
    texts.write_text(before[:-20])
    again = kdcode(*words)
    assert again.returncode == 0, again.stderr
    assert texts.read_text() == before
    assert read_rows(folder) == rows
    others = {file: time for file, time in modified.items() if file.parent != texts.parent}
    assert all(file.stat().st_mtime_ns == time for file, time in others.items())  # nothing else was measured again


@pytest.mark.parametrize("words, message", [
    (("--models", "nowhere"), "teacher nowhere is neither a folder nor available from the model hub"),
    (("--eval.problems", "none.jsonl"),
     "eval.problems is none.jsonl; choose humaneval, mbpp or an existing .jsonl file"),
    (("--eval.problems", "mbpp"), "cannot load MBPP from the model hub"),
    (("--eval.samples", 2, "--eval.k", "[3]"), "eval.k has 3 and eval.samples is 2"),
    (("--draft", "nowhere"), "there is no student in nowhere"),
])
def test_errors_are_one_line(kdcode, tiny_teacher, words, message):
    done = kdcode("eval", "--teacher.name", tiny_teacher, "--models", tiny_teacher, "--unsafe", *SMALL, *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
