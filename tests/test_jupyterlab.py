"""Pages in JupyterLab, in a real browser: what a reader sees first, plots in both themes, a training that is stopped.

JupyterLab takes long to start, so `make docs` runs these tests.
"""
import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

from conftest import needs_browser, start_jupyterlab

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
pytestmark = [pytest.mark.docs, needs_browser]
ROOT = Path(__file__).parent.parent
PAGES = ("tutorials/01_speculative_decoding", "tutorials/02_first_student", "03_loss")
FIRST = 6  # cells, at the top of a page
TIMEOUT = 120_000  # ms; a busy machine starts a kernel slowly
expect.set_options(timeout=TIMEOUT)

TRAINING = """\
from kdcode.notebook import set_up_page
set_up_page()

from kdcode.config import load_config
from kdcode.data import build_corpus
from kdcode.teacher import load_teacher
from kdcode.train import distill
config = load_config("config.yaml")
teacher = load_teacher(config.teacher)
corpus = build_corpus(config.data, teacher.tokenizer, "corpus", 0)
distill(config, teacher, corpus, "run")
"""
CONFIG = """\
teacher: {{name: '{teacher}', dtype: float32, device: cpu}}
data: {{source: stdlib, tokens: 4096, validation_tokens: 512, block_size: 64}}
student: {{layers: [0], draft_vocabulary: 0}}
targets: {{kind: online}}
train: {{epochs: 4000, eval_steps: 4000, batch_size: 2}}
"""


def has_image(cell): return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_teacher):
    """A folder with copies of pages, and a page that trains for hours."""
    folder = tmp_path_factory.mktemp("lab")
    for page in PAGES: shutil.copy(ROOT/"nbs"/f"{page}.ipynb", folder)
    plots = [cell for page in PAGES for cell in nbformat.read(ROOT/"nbs"/f"{page}.ipynb", 4).cells if has_image(cell)]
    nbformat.write(nbformat.v4.new_notebook(cells=plots), folder/"plots.ipynb")
    (folder/"config.yaml").write_text(CONFIG.format(teacher=tiny_teacher))
    cell = nbformat.v4.new_code_cell(TRAINING)
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), folder/"training.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    """JupyterLab, with settings of its own; return its address and the folder of its settings."""
    state = tmp_path_factory.mktemp("state")
    write_setting(state, "notification", {"fetchNews": "false", "checkForUpdates": False})
    with start_jupyterlab(sys.executable, folder, state) as address: yield address, state


def write_setting(state, name, values):
    file = state/"JUPYTERLAB_SETTINGS_DIR"/"@jupyterlab"/"apputils-extension"/f"{name}.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


@pytest.fixture
def visit(browser, lab, folder):
    """Open a notebook in JupyterLab's dark or light theme."""
    contexts = []

    def visit(file, theme="light"):
        write_setting(lab[1], "themes", {"theme": f"JupyterLab {theme.title()}"})
        contexts.append(browser.new_context(viewport={"width": 1300, "height": 1000}))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT)
        page.goto(f"{lab[0]}/lab/tree/{Path(file).name}.ipynb?reset")
        cells = len(json.loads((folder/f"{Path(file).name}.ipynb").read_text())["cells"])
        expect(page.locator(".jp-Notebook .jp-Cell").nth(min(cells, FIRST) - 1)).to_be_attached()
        return page
    yield visit
    for context in contexts: context.close()


@pytest.mark.parametrize("file", PAGES)
def test_a_page_begins_with_its_idea(visit, file):
    """Above the first section, the cells with set-up and imports of tests are collapsed."""
    page = visit(file)
    cells = page.locator(".jp-Notebook .jp-Cell").all()[:FIRST]
    texts = [cell.inner_text() for cell in cells]
    assert "\n#| hide" not in "".join(texts) and "set_up_page" not in "".join(texts), texts
    sources = [cell.source for cell in nbformat.read(ROOT/"nbs"/f"{file}.ipynb", 4).cells[:FIRST]]
    collapsed = [cell.locator(".jp-InputPlaceholder").count() for cell in cells]
    assert collapsed == [int("#| hide" in source) for source in sources] and any(collapsed)


CONTRAST = """async image => {
    await image.decode()
    const canvas = document.createElement("canvas")
    Object.assign(canvas, {width: image.naturalWidth, height: image.naturalHeight})
    const context = canvas.getContext("2d")
    context.drawImage(image, 0, 0)
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data
    const linear = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4
    const luminance = i => .2126 * linear(pixels[i]) + .7152 * linear(pixels[i + 1]) + .0722 * linear(pixels[i + 2])
    let darkest = 1, opaque = true
    for (let i = 0; i < pixels.length; i += 4) {
        darkest = Math.min(darkest, luminance(i))
        opaque = opaque && pixels[i + 3] == 255
    }
    return {opaque, text: (luminance(0) + .05) / (darkest + .05), corner: luminance(0)}
}"""
PAGE_LUMINANCE = """() => {
    const colour = getComputedStyle(document.querySelector(".jp-Notebook")).backgroundColor.match(/\\d+/g).map(Number)
    return Math.max(...colour) / 255
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_plots_are_readable_in_both_themes(visit, theme):
    page = visit("plots", theme)
    assert (page.evaluate(PAGE_LUMINANCE) > .5) == (theme == "light")
    expect(page.locator(".jp-OutputArea img").nth(FIRST - 1)).to_be_attached()
    plots = page.locator(".jp-OutputArea img").all()
    for plot in plots:
        seen = plot.evaluate(CONTRAST)
        assert seen["opaque"] and seen["corner"] > .9 and seen["text"] > 12, seen


PROGRESS = """() => {
    window.lines = []
    new MutationObserver(() => document.querySelectorAll(".jp-OutputArea").forEach(
        output => output.querySelector("progress") && window.lines.push(output.innerText.trim())))
        .observe(document.body, {childList: true, subtree: true, characterData: true})
}"""


def test_a_stopped_training_leaves_one_line(visit, lab, folder):
    page = visit("training")
    page.evaluate(PROGRESS)
    page.locator(".jp-Notebook .jp-Cell").first.click()
    expect(page.locator(".jp-NotebookPanel-toolbar")).to_contain_text("Kernel status: Idle")
    page.keyboard.press("Control+Enter")
    output = page.locator(".jp-Cell .jp-OutputArea")
    expect(output).to_contain_text(re.compile(r"step [1-9]\d* of \d+"))  # the training runs
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Interrupt the kernel").click()
    expect(output).to_contain_text("a checkpoint is saved")
    text = output.inner_text().strip()
    lines = [line for line in text.splitlines() if line.strip()]
    assert "Traceback" not in text and len(lines) == 1, text
    assert re.fullmatch(r"stopped after step \d+; a checkpoint is saved, and resume=True continues from it", lines[0])
    seen = page.evaluate("window.lines")
    assert any("loading teacher" in line for line in seen), seen[:5]
    assert any(re.search(r"step \d+ of \d+.* to go", line) for line in seen)


def test_plain_images_fail_the_contrast_test(browser):
    """The control of the test of plots: a transparent one, as a notebook could have it, is noticed."""
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.plot([1, 2])
    file = io.BytesIO()
    figure.savefig(file, transparent=True)
    plt.close(figure)
    page = browser.new_page()
    page.set_content(f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">')
    assert not page.locator("img").evaluate(CONTRAST)["opaque"]
    page.close()
