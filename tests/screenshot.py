"""Takes the pictures in the README; kdcode record runs/NAME NAME keeps them.

python tests/screenshot.py serves SmolLM2 with its shipped student, lets the page decode, and writes playground.png and a report to runs/playground.
python tests/screenshot.py decode-picture decodes a HumanEval prompt with the two, and writes what a notebook shows of it, decode.png, and a report to runs/decode-picture.
"""
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager

from conftest import ROOT
from playwright.sync_api import expect, sync_playwright

from kdcode.report import Report
from kdcode.config import Config, DecodeSettings
from kdcode.data import humaneval_problems
from kdcode.decode import complete, load_draft
from kdcode.teacher import load_teacher

PROMPT = 'def fibonacci(n):\n'
PROBLEM = "HumanEval/28"
STYLE = "body { display: inline-block; max-width: 820px; margin: 0; padding: 18px 24px; font: 15px/1.5 system-ui, sans-serif; color: #1d232b; background: #fff } pre { margin: 0 0 14px; font: 14px/1.5 monospace }"


@contextmanager
def browser():
    """A real browser without a window."""
    with sync_playwright() as engine: yield engine.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])


def picture(url, file):
    """Decodes in the page, and writes it as a picture with a rejected draft's tip open; gives what the page says."""
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1280, "height": 860}, device_scale_factor=1.5)
        page.goto(url)
        page.get_by_label("Prompt").fill(PROMPT)
        for wanted in (8, 96):  # the first warms up
            page.get_by_label("Tokens at most").fill(str(wanted))
            page.get_by_role("button", name="Run").click()
            expect(page.get_by_role("status")).to_contain_text("Done", timeout=120_000)
            page.wait_for_timeout(500)
        page.locator("#text .mark").first.hover()
        page.screenshot(path=file)
        return page.get_by_role("status").text_content()


def playground(folder):
    """The page, with the server's numbers."""
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "kdcode.cli", "serve", "--serve.port", str(port), "--draft", str(ROOT/"models"/"smollm2-135m-draft")], stdout=subprocess.PIPE, text=True)
    try:
        assert "is served at" in server.stdout.readline()
        said = picture(f"http://127.0.0.1:{port}/", folder/"playground.png")
    finally: server.terminate()
    figures = dict(zip(("speculative_tokens_per_second", "speedup"), map(float, re.search(r"([\d.]+) tokens/s, ([\d.]+) times", said).groups())))
    Report("python tests/screenshot.py", Config(name="playground"), figures, [{"the page says": said}], ["The playground with SmolLM2 and its shipped student: one text, with drafts and then by the teacher alone."], ("playground.png",)).save(folder)


def decode_picture(folder):
    """A result as a notebook shows it, in a light page."""
    teacher, config = load_teacher("smollm2"), Config(name="decode-picture", decode=DecodeSettings(max_new_tokens=68, gamma=4, adaptive=False))
    prompt = next(problem["prompt"] for problem in humaneval_problems(164) if problem["task_id"] == PROBLEM)
    result = complete(teacher, load_draft("smollm2", teacher), prompt, config.decode)
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 900, "height": 700}, device_scale_factor=2)
        page.set_content(f"<meta charset=utf-8><style>{STYLE}</style>{result._repr_html_()}")
        page.locator("body").screenshot(path=folder/"decode.png")
    s = result.statistics
    figures = {"acceptance_rate": s.acceptance_rate, "tokens_per_call": s.tokens_per_call, "drafted_share": sum(result.drafted) / s.tokens}
    rows = [{"prompt": PROBLEM, "new tokens": s.tokens, "drafted and accepted": sum(result.drafted), "calls of the teacher": s.calls, "tokens per call": s.tokens_per_call, "acceptance rate": s.acceptance_rate}]
    Report("python tests/screenshot.py decode-picture", config, figures, rows, ["What SmolLM2 writes after this prompt, greedily, with four drafts of its shipped student in each round: who wrote each token."], ("decode.png",)).save(folder)


def main(name="playground"):
    (folder := ROOT/"runs"/name).mkdir(parents=True, exist_ok=True)
    {"playground": playground, "decode-picture": decode_picture}[name](folder)


if __name__ == "__main__": main(*sys.argv[1:])
