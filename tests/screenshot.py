"""Takes the picture of the playground in the README: python tests/screenshot.py serves SmolLM2 with its shipped student, lets the page decode, and writes playground.png and a report to runs/playground; kdcode record runs/playground playground keeps them."""
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, wait_until
from playwright.sync_api import expect, sync_playwright

from kdcode.bench import Report
from kdcode.config import Config

PROMPT = 'def fibonacci(n):\n'


def picture(url, file):
    """Decodes in the page, and writes it as a picture with a rejected draft's tip open; gives what the page says."""
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 860}, device_scale_factor=1.5)
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


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "kdcode.cli", "serve", "--serve.port", str(port), "--draft", str(ROOT/"models"/"smollm2-135m-draft")], stdout=subprocess.PIPE, text=True)
    try:
        assert "is served at" in server.stdout.readline()
        said = picture(f"http://127.0.0.1:{port}/", folder/"playground.png")
    finally: server.terminate()
    figures = dict(zip(("speculative_tokens_per_second", "speedup"), map(float, re.search(r"([\d.]+) tokens/s, ([\d.]+) times", said).groups())))
    Report("python tests/screenshot.py", Config(name="playground"), figures, [{"the page says": said}], ["The playground with SmolLM2 and its shipped student: one text, with drafts and then by the teacher alone."], ("playground.png",)).save(folder)


if __name__ == "__main__": main(ROOT/"runs"/"playground")
