"""The embedded teacher completes the example prompts, and those of the lessons, with correct functions."""
import json
import re
import textwrap
from pathlib import Path

import pytest

from kdcode.config import DecodeSettings, EXAMPLE_PROMPTS
from kdcode.sandbox import isolation, run_program

CHECKS = {
    "is_prime": "assert [n for n in range(12) if is_prime(n)] == [2, 3, 5, 7, 11]",
    "fibonacci": "assert [fibonacci(n) for n in range(8)] == [0, 1, 1, 2, 3, 5, 8, 13]",
    "mean": "assert mean([1, 2, 6]) == 3",
    "is_palindrome": "assert is_palindrome('level') and not is_palindrome('levels') and is_palindrome('')",
    "find_max": "assert find_max([3, 9, 2]) == 9 and find_max([-3, -9]) == -3",
}


def first_function(text):
    """Return the text up to the first further line that is not indented."""
    first, *lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), len(lines))
    return "\n".join([first, *lines[:end]])


@pytest.fixture(scope="module")
def embedded_pair():
    from kdcode.decode import load_draft
    from kdcode.teacher import load_teacher
    teacher = load_teacher("smollm2")
    return teacher, load_draft("smollm2", teacher)


@pytest.mark.parametrize("name", EXAMPLE_PROMPTS)
def test_an_example_prompt_gets_a_correct_function(embedded_pair, name):
    from kdcode.decode import complete
    settings = DecodeSettings(max_new_tokens=80, compile=False, stop=["\n\n", "\n```"])
    result = complete(*embedded_pair, EXAMPLE_PROMPTS[name], settings)
    program = first_function(EXAMPLE_PROMPTS[name] + result.text)
    assert run_program(f"{program}\n\n{CHECKS[name]}\n", isolation()) == "passed", program


def test_the_readmes_python_runs_from_top_to_bottom(tiny_teacher):
    """Each block uses the names of those before it; a model of the hub is replaced by a tiny one."""
    readme = (Path(__file__).parent.parent/"README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    program = re.sub(r'"Qwen/[^"]+"', repr(str(tiny_teacher)), "".join(blocks))
    assert len(blocks) > 2 and str(tiny_teacher) in program
    exec(program, {})


LESSON_PROMPT = "def fibonacci(n):\n"
LESSONS = sorted((Path(__file__).parent.parent/"nbs"/"tutorials").glob("*.ipynb"))


def test_the_lessons_prompt_gets_a_correct_function(embedded_pair):
    """The teacher repeats the first line and completes that."""
    from kdcode.decode import complete
    text = complete(*embedded_pair, LESSON_PROMPT, DecodeSettings(max_new_tokens=56, compile=False)).text
    program = first_function(text.lstrip("\n"))
    assert run_program(f"{program}\n\n{CHECKS['fibonacci']}\n", isolation()) == "passed", program


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_lessons_use_prompts_that_are_checked_here(lesson):
    """Lesson 4 also asks a tiny teacher of its own, which was trained for seconds and gets no function right."""
    source = "".join(line for cell in json.loads(lesson.read_text())["cells"] for line in cell["source"])
    used = {found.replace("\\n", "\n") for found in re.findall(r'"(def \w+\([^"]*\):(?:\\n)?)"', source)}
    if lesson.stem == "04_own_teacher": used = {prompt for prompt in used if not prompt.startswith("def mean(values):")}
    assert used <= {LESSON_PROMPT, *EXAMPLE_PROMPTS.values()}
    assert used or not lesson.stem.startswith(("01", "02", "06"))


def test_a_wrong_function_is_noticed():
    for name, prompt in EXAMPLE_PROMPTS.items():
        wrong = first_function(prompt + textwrap.indent("\nreturn None", "    "))
        assert run_program(f"{wrong}\n\n{CHECKS[name]}\n", isolation()) != "passed"
