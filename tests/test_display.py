"""What a person sees: names after `kdcode.`, objects in a notebook, in a terminal, in Markdown, and in a page that lost its styles."""
import ast
import re
import subprocess
import sys
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


def python(code, **options): return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, **options).stdout


def test_a_dozen_names_each_with_a_docstring():
    assert dir(kdcode) == sorted(kdcode.__all__) and 10 <= len(kdcode.__all__) <= 13
    for name in kdcode.__all__: assert getattr(kdcode, name).__doc__ and getattr(kdcode, name).__module__.startswith("kdcode."), name
    with pytest.raises(AttributeError, match="no attribute 'distil'"): kdcode.distil
    with pytest.raises(ImportError, match="cannot import name 'distil'"): exec("from kdcode import distil")


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT/"kdcode"/"__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    assert {alias.name: node.module for node in block.body for alias in node.names} == kdcode._MODULES
    assert sorted(kdcode._MODULES) == kdcode.__all__


def test_import_loads_nothing_and_names_load_what_they_need():
    loaded = "print(*sorted({'torch', 'pandas', 'transformers', 'matplotlib', 'IPython'} & set(sys.modules)))"
    assert python(f"import sys, kdcode; dir(kdcode); hasattr(kdcode, 'nothing'); {loaded}") == "\n"
    assert python(f"import sys; from kdcode import Config; Config(); {loaded}") == "pandas\n"


def test_a_terminal_needs_no_ipython():
    out = python("""
import sys
sys.modules["IPython"] = None
from kdcode import Config
from kdcode.report import Report
from kdcode.result import SpeculativeResult, Statistics
from kdcode.train import progress_shown
print(Config(), Report("command", Config(), {}, [{"a": 1}], ["note"]), Statistics(), SpeculativeResult([1], [2], [True], Statistics()), type(progress_shown()).__name__, sep="\\n")
""")
    assert out.splitlines() == ["Config()", "quickstart: command", "", "a", "1", "", "note", "0 tokens in 0 calls of the teacher", "[2]", "LineProgress"]


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def outputs(kernel, code):
    """What a cell shows, each output as a Jupyter page has it in the end: what is rewritten, is rewritten."""
    shown = []
    def hook(message):
        kind, content = message["msg_type"], message["content"]
        assert kind != "error", content["traceback"]
        name = content.get("transient", {}).get("display_id")
        if kind == "update_display_data": next(one for one in shown if one["id"] == name)["data"] = content["data"]
        elif kind in ("display_data", "execute_result"): shown.append({"id": name, "data": content["data"]})
        elif kind == "stream": shown.append({"id": None, "data": {"stream": content["text"]}})
    kernel.execute_interactive(code, output_hook=hook, timeout=240)
    return [one["data"] for one in shown]


def test_tab_offers_the_dozen(kernel):
    assert outputs(kernel, "import kdcode") == []
    reply = kernel.complete("kdcode.", reply=True, timeout=60)["content"]
    assert sorted(match.removeprefix("kdcode.") for match in reply["matches"]) == kdcode.__all__


def test_configuration_is_a_table(kernel):
    shown, = outputs(kernel, "kdcode.Config(name='mine')")
    assert shown["text/plain"] == "Config(name='mine')"
    assert shown["text/html"].count("<table>") == 10 and "<b>mine</b>" in shown["text/html"] and "peak of the schedule" in shown["text/html"]


@pytest.fixture(scope="module")
def page(tiny_teacher, tmp_path_factory):
    """A notebook that shows everything once, as `jupyter execute` leaves it."""
    folder = tmp_path_factory.mktemp("page")
    cells = ["import os; os.environ |= {'HF_HUB_OFFLINE': '1', 'KDCODE_HOME': os.getcwd()}\nimport functools, kdcode, tqdm.notebook, transformers\nfrom kdcode.config import *\n"
             "transformers.utils.logging.disable_progress_bar()\ntqdm.notebook.tqdm.__init__ = functools.partialmethod(tqdm.notebook.tqdm.__init__, disable=True)",
             "config = Config(data=DataSettings(tokens=2048, validation_tokens=512, block_size=64), student=StudentSettings(layers=[0], draft_vocabulary=500), targets=TargetsSettings(kind='top_k'),\n"
             "                train=TrainSettings(batch_size=8, eval_steps=2, logging_steps=1), decode=DecodeSettings(max_new_tokens=12, gamma=3, adaptive=False, problems=1))\nconfig",
             f"teacher = kdcode.load_teacher({str(tiny_teacher)!r})\nteacher.name = 'tiny'\nteacher",
             "corpus = kdcode.build_corpus(config.data, teacher.tokenizer, 'corpus', 0)\ncorpus",
             "student = kdcode.distill(config, teacher, corpus)",
             "text = kdcode.complete(teacher, student, '<script>alert(1)</script>\\n\\n\\ndef f(n):\\n', config.decode)\ntext",
             "text.statistics",
             "report = kdcode.bench_decode(teacher, student, config=config)\nreport"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def kinds(cell): return [set(output.get("data", {})) for output in cell.outputs if output.output_type != "stream"]


def test_page_shows_everything(page):
    config, teacher, corpus, training, text, statistics, report = page.cells[1:]
    table = {"text/html", "text/plain"}
    assert list(map(kinds, (config, corpus, text, statistics))) == [[table]] * 4
    assert kinds(teacher) == [{"text/plain"}] and "teacher tiny: LlamaForCausalLM" in teacher.outputs[0].data["text/plain"]
    assert kinds(report) == [table, {"image/png", "text/plain"}]
    for cell in (config, teacher, corpus, statistics, report): assert len(cell.outputs[0].data["text/plain"]) < 1000  # the terminal's


def test_training_leaves_its_curves_and_no_widget(page):
    labelling, curves = (output for output in page.cells[4].outputs if output.output_type != "stream")  # a stream has the lines of transformers
    assert labelling.data == {"text/plain": ""}  # the bar of the targets
    assert set(curves.data) == {"image/png", "text/plain"} and re.match(r"step 4 of 4, loss [\d.]+, acceptance rate [\d.]+, 0:\d\d:\d\d$", curves.data["text/plain"])
    assert "widget" not in str(page.metadata) and not re.search(r"<progress|widget-view|it/s\]", nbformat.writes(page))


def test_markdown_keeps_it_readable(page):
    body, resources = MarkdownExporter().from_notebook_node(page)
    shown = BeautifulSoup(MarkdownIt("commonmark", {"html": True}).render(body), "html.parser")
    assert not shown.find("script") and "alert(1)</script>" in shown.find("pre", style=True).text
    for element in shown.find_all(style=True): del element["style"]  # as GitHub does
    text = next(element for element in shown.find_all("pre") if element.find("b"))
    assert text.text == "<script>alert(1)</script>\n\n\ndef f(n):\n" + page.cells[5].outputs[0].data["text/plain"]  # whole, though it has empty lines
    assert len(shown.find_all("table")) == 13 and len(resources["outputs"]) == 2  # ten of the configuration, the corpus, the statistics, the report; two pictures
    assert "█" in shown.text or "░" in shown.text
