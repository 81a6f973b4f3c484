"""From answers of many forms to outcomes: a right answer passes whatever its form, and a wrong one fails."""
import json

import pytest

from kdcode.code_eval import mbpp_problem, solution, test_program as make_program
from kdcode.sandbox import ISOLATIONS, run_program, run_programs

ISOLATION = next(name for name in ISOLATIONS if run_program("pass", name) == "passed")
ADD = {"task_id": "own/1", "entry_point": "add", "prompt": 'import math\n\n\ndef add(a, b):\n    """Adds."""\n',
       "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4"}
FUNCTION = "def add(a, b):\n    return a + b"
INDENTED = FUNCTION.replace("\n", "\n   ")
DOCSTRING = 'def add(a, b):\n    """Adds.\n\n```\nadd(1, 2)\n```\n    """\n    return a + b'
CHAT = {
    "an installation first": f"```bash\npip install x\n```\n```python\n{FUNCTION}\n```",
    "an example first": f"Usage:\n```python\nprint(add(1, 2))\n```\nThe code:\n```python\n{FUNCTION}\n```",
    "an example last": f"```python\n{FUNCTION}\n```\nUsage:\n```python\nprint(add(1, 2) / 0)\n```",
    "a second function, truncated": f"```python\n{FUNCTION}\n```\nShorter:\n```python\ndef add(a, b): return (a +",
    "fences in a docstring": f"```python\n{DOCSTRING}\n```\nDone.\n```\nadd(1, 2)\n```",
    "indented fences in a docstring": f"```python\n{DOCSTRING.replace('```', '    ```')}\n```\nDone.",
    "in a list": f"1. Write:\n\n   ```python\n   {INDENTED}\n   ```\n2. Done.",
    "after a list marker": f"1. ```python\n   {INDENTED}\n   ```",
    "tildes": f"~~~python\n{FUNCTION}\n~~~",
    "CRLF": f"```python\n{FUNCTION}\n```".replace("\n", "\r\n"),
    "imports from __future__": f'```python\n"""Adds."""\nfrom __future__ import annotations\n{FUNCTION}\n```',
    "a main program": f"```python\n{FUNCTION}\n\nif __name__ == '__main__':\n    add(int(input()), 1)\n```",
    "a helper check": "```python\ndef check(a, b): return a + b\ndef add(a, b): return check(a, b)\n```",
}
PLAIN = {
    "a string at the margin": '    text = """\nfoo\nbar\n"""\n    return a + b\n\nprint("x")\nx = (',
    "a list at the margin": "    numbers = [\na,\nb]\n    return sum(numbers)\n\ndef main(:",
}


def outcomes_of(answers, chat):
    """Return the outcome for each answer."""
    programs = [make_program(ADD, solution(ADD, answer, chat)) for answer in answers.values()]
    return dict(zip(answers, run_programs(programs, ISOLATION)))


@pytest.mark.parametrize("answers, chat", [(CHAT, True), (PLAIN, False)], ids=["chat", "plain"])
def test_answers_of_every_form(answers, chat):
    outcomes = outcomes_of(answers, chat)
    assert set(outcomes.values()) == {"passed"}, outcomes
    wrong = {form: answer.replace("a + b", "a - b").replace("sum(", "max(") for form, answer in answers.items()}
    outcomes = outcomes_of(wrong, chat)
    assert set(outcomes.values()) == {"AssertionError: "}, outcomes


def test_names_of_the_tests_are_free():
    """The function may be named like anything in the tests and in the line that runs them."""
    names = ["check", "candidate", "names", "METADATA", "exec", "globals", "dict", "math", "sum"]
    for body, expected in {"n):\n    return n == 1": "passed", "n):\n    return True": "AssertionError: "}.items():
        programs = []
        for name in names:
            tests = [f"assert {name}(1) == True", f"assert {name}(2) == False"]
            problem = mbpp_problem({"task_id": 1, "prompt": "Is a number 1?", "test_list": tests,
                                    "test_imports": ["import math", "METADATA = {}"]})
            programs.append(make_program(problem, solution(problem, body, False)))
        outcomes = dict(zip(names, run_programs(programs, ISOLATION)))
        assert set(outcomes.values()) == {expected}, outcomes


def test_tests_may_import_from_the_future():
    test = "from __future__ import annotations\n" + ADD["test"]
    assert run_program(make_program(ADD | {"test": test}, f"{ADD['prompt']}    return a + b\n"), ISOLATION) == "passed"


def test_problems_that_need_a_missing_module_are_refused(kdcode, tiny_teacher, tmp_path):
    lines = [ADD, ADD | {"task_id": "own/2", "test": "import numpy as np\n" + ADD["test"]}]
    (tmp_path/"own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("--eval.problems", tmp_path/"own.jsonl", "--eval.prompt", "plain", "--eval.max_new_tokens", 1,
             "--eval.lines", 0, "--eval.documents", 0, "--decode.problems", 1, "--decode.max_new_tokens", 1)
    done = kdcode("eval", "--teacher.name", tiny_teacher, "--models", tiny_teacher, "--unsafe", *words)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "problem own/2 imports numpy, but programs in the sandbox have only the standard library" in line
