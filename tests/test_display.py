"""How the library displays itself: names after `kdcode.`, and objects in a terminal, a notebook and Markdown."""
import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from jupyter_client.manager import start_new_kernel
from markdown_it import MarkdownIt
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

import kdcode

ROOT = Path(__file__).parent.parent


def python(code):
    """Run code in a new Python process and return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


# Names

def test_package_has_about_a_dozen_documented_names():
    assert dir(kdcode) == sorted(kdcode.__all__) and 10 <= len(kdcode.__all__) <= 13
    for name in kdcode.__all__:
        assert getattr(kdcode, name).__doc__ and getattr(kdcode, name).__module__.startswith("kdcode."), name
    with pytest.raises(AttributeError, match="no attribute 'distil'"): kdcode.distil
    with pytest.raises(ImportError, match="cannot import name 'distil'"): exec("from kdcode import distil")


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT/"kdcode"/"__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    assert {alias.name: node.module for node in block.body for alias in node.names} == kdcode._MODULES
    assert sorted(kdcode._MODULES) == kdcode.__all__


def test_imports_are_lazy():
    """Neither `import kdcode` nor the configuration imports a large library. Control: what is imported is found."""
    print_loaded = "print(*sorted({'torch', 'pandas', 'transformers', 'matplotlib', 'IPython'} & set(sys.modules)))"
    assert python(f"import sys, kdcode; dir(kdcode); hasattr(kdcode, 'nothing'); {print_loaded}") == "\n"
    assert python(f"import sys; from kdcode import Config; Config(); {print_loaded}") == "\n"
    assert "pandas" in python(f"import sys, pandas; {print_loaded}")


# Terminal

MODULES = sorted(path.stem for path in (ROOT/"kdcode").glob("*.py") if path.stem not in ("_modidx", "__init__"))
WITHOUT_NOTEBOOKS = f"""
import sys
sys.modules |= {{"nbdev": None, "fastcore": None, "IPython": None}}  # importing them fails
from kdcode import {', '.join(MODULES)}
from kdcode import Config
from kdcode.callbacks import progress_callback
from kdcode.report import Report
from kdcode.result import SpeculativeResult, Statistics
report = Report("command", Config(), {{}}, [{{"a": 1}}], ["note"])
result = SpeculativeResult([1], [2], [True], Statistics())
print(Config(), report, Statistics(), result, type(progress_callback()).__name__, sep="\\n")
"""


def test_library_and_its_terminal_display_need_neither_nbdev_nor_fastcore_nor_ipython():
    assert {"config", "serve"} <= set(MODULES)
    lines = python(WITHOUT_NOTEBOOKS).splitlines()
    report = ["quickstart: command", "", "a", "1", "", "note"]
    assert lines == ["Config()", *report, "0 tokens in 0 target calls", "[2]", "LineProgress"]


# Kernel

@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run_cell(kernel, code):
    """Run a cell and return its outputs in their final state, after all updates."""
    shown = []

    def hook(message):
        kind, content = message["msg_type"], message["content"]
        assert kind != "error", content["traceback"]
        display_id = content.get("transient", {}).get("display_id")
        if kind == "update_display_data":
            next(output for output in shown if output["id"] == display_id)["data"] = content["data"]
        elif kind in ("display_data", "execute_result"):
            shown.append({"id": display_id, "data": content["data"]})
        elif kind == "stream":
            shown.append({"id": None, "data": {"stream": content["text"]}})
    kernel.execute_interactive(code, output_hook=hook, timeout=600)
    return [output["data"] for output in shown]


def test_tab_completion_offers_the_public_names(kernel):
    assert run_cell(kernel, "import kdcode") == []
    reply = kernel.complete("kdcode.", reply=True, timeout=300)["content"]
    assert sorted(match.removeprefix("kdcode.") for match in reply["matches"]) == kdcode.__all__


def test_configuration_is_displayed_as_a_table(kernel):
    shown, = run_cell(kernel, "import kdcode\nkdcode.Config(name='mine')")
    assert shown["text/plain"] == "Config(name='mine')"
    assert shown["text/html"].count("<table>") == 10 and "<b>mine</b>" in shown["text/html"]
    assert "peak learning rate" in shown["text/html"]


# Notebook

SETUP = """import os
os.environ |= {'HF_HUB_OFFLINE': '1', 'KDCODE_HOME': os.getcwd()}
import functools, kdcode, tqdm.notebook, transformers
from kdcode.config import *
transformers.utils.logging.disable_progress_bar()
tqdm.notebook.tqdm.__init__ = functools.partialmethod(tqdm.notebook.tqdm.__init__, disable=True)"""
CONFIG = """config = Config(
    data=DataSettings(tokens=2048, validation_tokens=512, block_size=64),
    student=StudentSettings(layers=[0], draft_vocabulary=500), targets=TargetsSettings(kind='top_k'),
    train=TrainSettings(batch_size=8, eval_steps=2, logging_steps=1),
    decode=DecodeSettings(max_new_tokens=12, gamma=3, adaptive=False, problems=1))
config"""
PROMPT = "<script>alert(1)</script>\n\n\ndef f(n):\n"


@pytest.fixture(scope="module")
def page(tiny_teacher, tmp_path_factory):
    """A notebook that displays every object once, run like `jupyter execute`."""
    folder = tmp_path_factory.mktemp("page")
    cells = [SETUP, CONFIG,
             f"teacher = kdcode.load_teacher({str(tiny_teacher)!r})\nteacher.name = 'tiny'\nteacher",
             "corpus = kdcode.build_corpus(config.data, teacher.tokenizer, 'corpus', 0)\ncorpus",
             "student = kdcode.distill(config, teacher, corpus)",
             f"text = kdcode.complete(teacher, student, {PROMPT!r}, config.decode)\ntext",
             "text.statistics",
             "report = kdcode.bench_decode(teacher, student, config=config)\nreport"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return notebook


def displays(cell):
    """Return the outputs of a cell, without streams (transformers writes to them)."""
    return [output for output in cell.outputs if output.output_type != "stream"]


def mime_types(cell): return [set(output.get("data", {})) for output in displays(cell)]


def test_every_object_has_its_display(page):
    config, teacher, corpus, _, text, statistics, report = page.cells[1:]
    table = {"text/html", "text/plain"}
    assert list(map(mime_types, (config, corpus, text, statistics))) == [[table]] * 4
    assert mime_types(teacher) == [{"text/plain"}]
    assert "teacher tiny: LlamaForCausalLM" in teacher.outputs[0].data["text/plain"]
    assert mime_types(report) == [table, {"image/png", "text/plain"}]
    for cell in (config, teacher, corpus, statistics): assert len(cell.outputs[0].data["text/plain"]) < 1000
    lines = report.outputs[0].data["text/plain"].splitlines()
    assert sum(len(textwrap.wrap(line, 80)) or 1 for line in lines) <= 24  # a terminal's screen


def test_training_displays_curves_and_no_widget(page):
    curves, = displays(page.cells[4])
    assert set(curves.data) == {"image/png", "text/plain"}
    assert re.match(r"step 4 of 4, loss [\d.]+, acceptance rate [\d.]+, 0:\d\d:\d\d$", curves.data["text/plain"])
    assert "widget" not in str(page.metadata)
    assert not re.search(r"<progress|widget-view|it/s\]", nbformat.writes(page))


def test_markdown_without_styles_is_readable(page):
    body, resources = MarkdownExporter().from_notebook_node(page)
    shown = BeautifulSoup(MarkdownIt("commonmark", {"html": True}).render(body), "html.parser")
    assert not shown.find("script") and "alert(1)</script>" in shown.find("pre", style=True).text
    for element in shown.find_all(style=True): del element["style"]  # as GitHub does
    text = next(element for element in shown.find_all("pre") if element.find("b"))
    new_text = page.cells[5].outputs[0].data["text/plain"]
    assert text.text == PROMPT + new_text  # empty lines do not end the block
    assert len(shown.find_all("table")) == 13  # ten of the configuration, corpus, statistics, report
    assert len(resources["outputs"]) == 2  # plots of the training and of the report
    assert "█" in shown.text or "░" in shown.text


def test_every_plot_of_a_notebook_is_displayed(kernel):
    """The first figure turns on the display of all figures, and the style does not turn it off again."""
    run_cell(kernel, "import matplotlib.pyplot as plt\nfrom kdcode.notebook import plot_style\n"
                     "draw = plot_style(lambda: plt.subplots(figsize=(1, 1))[0])")
    for _ in range(2):
        shown, = run_cell(kernel, "figure = draw()")
        assert "image/png" in shown


def plot_functions():
    """The functions of the library that make a figure."""
    for path in sorted((ROOT/"kdcode").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "plt.subplots" in ast.unparse(node): yield path.stem, node


def test_every_plot_has_the_style_of_all_plots():
    functions = list(plot_functions())
    styled = [name for name, node in functions if "plot_style" in map(ast.unparse, node.decorator_list)]
    assert len(functions) > 7 and styled == [name for name, _ in functions]


def test_a_plot_is_the_same_in_a_dark_session():
    """A notebook with a dark style of its own gets the light, opaque plots of the library."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_hex
    from kdcode.callbacks import plot_history
    from kdcode.notebook import COLORS
    names = ("loss", "ce", "kl", "agreement", "acceptance_rate", "perplexity")
    history = [{"step": 0} | {f"eval_{name}": .5 for name in names}, {"step": 4, "loss": 2., "ce": 2.}]
    with plt.style.context("dark_background"):
        assert plt.rcParams["figure.facecolor"] == "black"
        figure = plot_history(history)
        assert plt.rcParams["figure.facecolor"] == "black"  # only the plot is changed
    lines = {to_hex(line.get_color()) for axes in figure.axes for line in axes.lines}
    assert to_hex(figure.get_facecolor()) == "#ffffff" and lines & set(COLORS)
    assert to_hex(figure.axes[0].xaxis.label.get_color()) == "#1d232b"
    plt.close(figure)
