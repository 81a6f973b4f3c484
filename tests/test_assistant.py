"""The assistant: what it asks the server for, its set-up, and suggestions and chat in JupyterLab, in a real browser.

`make test-assistant` installs Notebook Intelligence in an environment of its own and runs the tests with a browser.
"""
import os
import re
import subprocess
import sys

import nbformat
import openai
import pytest

from conftest import needs_browser, ROOT, start_jupyterlab, wait_until
from kdcode import assistant

PYTHON = ROOT/".assistant"/"bin"/"python"
TIMEOUT = 120_000  # ms; a busy machine starts JupyterLab slowly
KEY = "a secret"


def expected_completion(client, prefix):
    """Return what the server suggests after a prefix."""
    model = client.get("/v1/models").json()["data"][0]["id"]
    request = {"model": model, "prompt": prefix, "max_tokens": assistant.MAX_TOKENS, "temperature": 0, "stop": "\n\n"}
    return client.post("/v1/completions", json=request).json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def server(served):
    """A server with an API key; yields its client."""
    with served(key=KEY) as (client, _):
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


def test_completions_are_the_servers(server, monkeypatch):
    monkeypatch.setenv("KDCODE_API_KEY", KEY)
    client = assistant.make_client(f"{server.base_url}/v1")
    expected = expected_completion(server, "def fib(")
    assert expected
    for suffix in ("", "\nprint(fib(10))"):  # this model refuses a suffix
        assert assistant.complete(client, "def fib(", suffix, lambda: False) == expected
    assert assistant.complete(client, "def fib(", "", lambda: True) == ""
    monkeypatch.delenv("KDCODE_API_KEY")
    with pytest.raises(openai.AuthenticationError):
        assistant.complete(assistant.make_client(f"{server.base_url}/v1"), "def fib(", "", lambda: False)


def set_up(home, *arguments, python=sys.executable):
    """Run the command with a home folder."""
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT), "KDCODE_API_KEY": KEY}
    command = [python, "-m", "kdcode.assistant", *arguments]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)


@pytest.mark.parametrize("arguments, message", [
    (("--port", "80"), "kdcode.assistant: '--port 80' is not one address; usage: python -m kdcode.assistant [URL]"),
    ((), f"kdcode.assistant: Notebook Intelligence is not installed in {sys.prefix}; "
         "run make assistant in the checkout and use .assistant/bin/python")])
def test_set_up_reports_a_problem_in_one_line(tmp_path, arguments, message):
    done = set_up(tmp_path, *arguments)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(message)


@pytest.fixture(scope="module")
def lab(server, tmp_path_factory):
    """JupyterLab that is set up for the server; yields its address. The key is in its environment only."""
    if not PYTHON.exists(): pytest.skip("Notebook Intelligence is not installed; run make assistant")
    home = tmp_path_factory.mktemp("home")
    done = set_up(home, str(server.base_url), python=PYTHON)
    assert done.returncode == 0, done.stderr
    (folder := home/"notebooks").mkdir()
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell()], metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder/"fib.ipynb")
    with start_jupyterlab(PYTHON, folder, home, HOME=str(home), KDCODE_API_KEY=KEY) as address: yield address
    settings = home/".jupyter"/"nbi"/"config.json"
    assert "kdcode-chat" in settings.read_text() and KEY not in settings.read_text()


@pytest.fixture
def page(lab, browser):
    """The notebook in JupyterLab."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(TIMEOUT)
    page.goto(f"{lab}/lab/tree/fib.ipynb?reset")
    page.locator(".jp-Notebook .jp-Cell .cm-content").first.wait_for()
    expect(page.locator(".jp-NotebookPanel-toolbar")).to_contain_text("Kernel status: Idle")
    yield page
    page.close()


def expect(locator):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    playwright.expect.set_options(timeout=TIMEOUT)
    return playwright.expect(locator)


@pytest.mark.assistant
@needs_browser
def test_a_suggestion_is_accepted(page, server):
    suggestion = expected_completion(server, "def fib(")
    cell = page.locator(".jp-Notebook .jp-Cell .cm-content").first
    cell.click()
    page.keyboard.type("def fib(")
    ghost = page.locator(".jp-GhostText")
    expect(ghost).to_have_text(suggestion)
    expect(cell.locator(".cm-line").first).to_contain_text("def fib(")
    page.keyboard.press("Tab")
    expect(ghost).to_have_count(0)
    expect(cell).to_have_text(f"def fib({suggestion}")


@pytest.mark.assistant
@needs_browser
def test_the_chat_answers(page, server):
    page.locator('[data-id="notebook-intelligence-tab"]').click()
    page.get_by_text("Skip tour").click()
    page.get_by_placeholder("Ask Notebook Intelligence...").click()
    page.keyboard.type("What is a list?")
    page.keyboard.press("Enter")
    answer = page.locator(".chat-message").nth(1)
    expect(answer).to_contain_text(re.compile(r"AI Assistant.*\d\d:\d\d:\d\d\s*\S", re.DOTALL))
    answered = 'kdcode_requests_total{path="/v1/chat/completions",status="200"} 1.0'
    wait_until(lambda: answered in server.get("/metrics").text)
