"""Take the pictures in the README; `kdcode record runs/NAME NAME` keeps them.

python tests/screenshot.py
    serves SmolLM2 with its shipped student, decodes in the playground, and writes playground.png and a report
    to runs/playground
python tests/screenshot.py decode-picture
    decodes an example prompt, and writes the result as a notebook shows it, decode.png, and a report
    to runs/decode-picture; the picture is as wide as a phone, so that it is readable there
"""
import argparse
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager

from conftest import ROOT
from playwright.sync_api import expect, sync_playwright

from kdcode.config import Config, DecodeSettings, EXAMPLE_PROMPT
from kdcode.decode import complete, load_draft
from kdcode.report import Report
from kdcode.teacher import load_teacher

WARM_UP_TOKENS, TOKENS = 8, 96
STYLE = """
body {
    display: inline-block; max-width: 390px; margin: 0; padding: 12px 14px;
    font: 13px/1.5 system-ui, sans-serif; color: #1d232b; background: #fff
}
pre { margin: 0 0 10px; font: 13px/1.5 monospace }
"""


@contextmanager
def browser():
    """Start Chromium without a window."""
    arguments = ["--no-sandbox", "--disable-gpu"]
    with sync_playwright() as engine:
        yield engine.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)


def take_playground_picture(url, file):
    """Decode in the playground, write a picture with an open tooltip, and return the status line."""
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1280, "height": 860}, device_scale_factor=1.5)
        page.goto(url)
        for tokens in (WARM_UP_TOKENS, TOKENS):
            page.get_by_label("Max. tokens").fill(str(tokens))
            page.get_by_role("button", name="Run").click()
            expect(page.get_by_role("status")).to_contain_text("Done", timeout=120_000)
            page.wait_for_timeout(500)  # ms, for the animations
        page.locator("#text .mark").first.hover()
        page.screenshot(path=file)
        return page.get_by_role("status").text_content()


def playground(folder):
    """Write a picture of the playground, and a report with the numbers that it shows."""
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    draft = ROOT/"models"/"smollm2-135m-draft"
    command = [sys.executable, "-m", "kdcode.cli", "serve", "--serve.port", str(port), "--draft", str(draft),
               "--decode.compile", "off"]  # else compiling in the background would take a core meanwhile
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline().startswith("serving smollm2")
        status = take_playground_picture(f"http://127.0.0.1:{port}/", folder/"playground.png")
    finally: server.terminate()
    speed, speedup = map(float, re.search(r"(\d+\.?\d*) tokens/s, speedup (\d+\.\d+)", status).groups())
    figures = {"speculative_tokens_per_second": speed, "speedup": speedup}
    note = "The playground with SmolLM2 and its shipped student: the same prompt, decoded with and without drafting."
    report = Report("python tests/screenshot.py", Config(name="playground"), figures, [{"status line": status}], [note],
                    ("playground.png",))
    report.save(folder)


def decode_picture(folder):
    """Write a picture of a result as a notebook shows it, and a report with its statistics."""
    teacher = load_teacher("smollm2")
    settings = DecodeSettings(max_new_tokens=TOKENS, gamma=4, adaptive=False, stop=["\n\n"])
    config = Config(name="decode-picture", decode=settings)
    result = complete(teacher, load_draft("smollm2", teacher), EXAMPLE_PROMPT, config.decode)
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 420, "height": 700}, device_scale_factor=2)
        page.set_content(f"<meta charset=utf-8><style>{STYLE}</style>{result._repr_html_()}")
        page.locator("body").screenshot(path=folder/"decode.png")
    statistics, accepted = result.statistics, sum(result.drafted)
    figures = {"acceptance_rate": statistics.acceptance_rate, "tokens_per_call": statistics.tokens_per_call,
               "drafted_share": accepted / statistics.tokens}
    rows = [{"prompt": EXAMPLE_PROMPT.splitlines()[0], "new tokens": statistics.tokens,
             "accepted draft tokens": accepted, "target calls": statistics.calls,
             "tokens per target call": statistics.tokens_per_call,
             "acceptance rate α": statistics.acceptance_rate}]
    note = "Greedy decoding of SmolLM2 with γ = 4 draft tokens of its shipped student, and the origin of each token."
    Report("python tests/screenshot.py decode-picture", config, figures, rows, [note], ("decode.png",)).save(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="playground", choices=["playground", "decode-picture"])
    name = parser.parse_args().name
    folder = ROOT/"runs"/name
    folder.mkdir(parents=True, exist_ok=True)
    {"playground": playground, "decode-picture": decode_picture}[name](folder)


if __name__ == "__main__": main()
