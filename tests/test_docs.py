"""The docs site: its sources, the built pages, and every page in a browser.

Tests marked `docs` need the site in `_docs/`; `make docs` builds it and runs them.
"""
import dataclasses
import functools
import itertools
import json
import posixpath
import re
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

from conftest import needs_browser

ROOT = Path(__file__).parent.parent
SITE = ROOT/"_docs"
sys.path[:0] = [str(ROOT/"docs"), str(ROOT/"onyxia")]
import launch  # noqa: E402
import library  # noqa: E402
import pages as site_pages  # noqa: E402

docs = pytest.mark.docs
FOLDERS = [ROOT/"nbs"/folder for folder in ("", "tutorials", "experiments")]
NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in folder.glob("*.ipynb"))
GENERATED = {"search.html", "genindex.html", "py-modindex.html"}
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)


@functools.cache
def soup(file): return BeautifulSoup((SITE/file).read_text(), "html.parser")


@functools.cache
def anchors_in(file): return {element["id"] for element in soup(file).find_all(id=True)}


def page_of(notebook): return f"{site_pages.name_of(notebook)}.html"


# Sources of the site

@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_first_cell_has_only_title_and_summary(notebook):
    """nbdev makes the page title from the whole first cell and drops anything else in it."""
    first = "".join(json.loads((ROOT/notebook).read_text())["cells"][0]["source"])
    only_title = re.fullmatch(r"# [^\n]+\n\n> [^\n]+\n?", first)
    assert only_title, f"{notebook}: put title and summary in a cell of their own"


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_first_alpha_of_a_notebook_is_explained(notebook):
    """α is the weight of the loss or the acceptance rate: the text around its first use says which."""
    cells = json.loads((ROOT/notebook).read_text())["cells"]
    pages = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    paragraphs = [paragraph for page in pages for paragraph in page.split("\n\n")]
    first = next((i for i, paragraph in enumerate(paragraphs) if re.search(r"α|\\alpha", paragraph)), None)
    if first is None: return
    around = " ".join(paragraphs[max(first - 1, 0):first + 2])
    assert re.search("acceptance|accepted|loss", around), paragraphs[first]


def test_every_notebook_is_a_page():
    found = site_pages.find_pages()
    assert set(NOTEBOOKS) <= set(found) and len(NOTEBOOKS) > 40
    assert {"docs/faq.md", "docs/glossary.md", "models/smollm2-135m-draft/README.md"} <= set(found)
    assert len({page.name for page in found.values()}) == len(found)
    assert found["nbs/02a_eagle.ipynb"].name == "eagle"
    assert found["nbs/tutorials/06b_vllm.ipynb"].name == "tutorials/vllm"


def test_repository_links_become_site_links():
    found = site_pages.find_pages()
    def on_site(link, source="nbs/experiments/02_feature_layers.ipynb"):
        return site_pages.address(link, source, found[source].file, found)
    assert on_site("../03_loss.ipynb") == "../loss.ipynb"
    assert on_site("../index.ipynb#The-demo") == "../index.ipynb#the-demo"
    assert on_site("../../README.md") == "../index.ipynb"
    assert on_site("https://example.org/a") == "https://example.org/a"
    assert on_site("../../docs/glossary.md#near-tie") == "../glossary.md#near-tie"
    assert on_site("../../results/steps/report.md") == f"{site_pages.GITHUB}/blob/main/results/steps/report.md"
    assert on_site("../../configs") == f"{site_pages.GITHUB}/tree/main/configs"
    assert on_site("CONTRIBUTING.md", "nbs/index.ipynb") == "contributing.md"  # the index is also the README
    for broken in ("../nothing.ipynb", "../../results/nothing/report.md", "../../../outside"):
        with pytest.raises(SystemExit, match="does not exist"): on_site(broken)


def test_quarto_settings_include_every_notebook():
    """For `nbdev_preview`: the settings equal nbdev's, and the patterns match every notebook."""
    quarto, settings = yaml.safe_load((ROOT/"nbs"/"_quarto.yml").read_text()), site_pages.SETTINGS
    website, folder = quarto["website"], ROOT/"nbs"
    keys = {"title": "title", "description": "description", "repo-url": "git_url", "repo-branch": "branch"}
    assert {key: website[key] for key in keys} == {key: settings[name] for key, name in keys.items()}
    assert website["site-url"] == settings["doc_host"] + settings["doc_baseurl"]
    assert quarto["project"]["output-dir"] == settings["doc_path"]
    items = website["sidebar"]["contents"]
    patterns = [item["contents"] if isinstance(item, dict) else item for item in items]
    for given in (quarto["project"]["render"], patterns):
        matched = {path.relative_to(ROOT).as_posix() for pattern in given for path in folder.glob(pattern)}
        assert matched == set(NOTEBOOKS)


def test_links_in_code_are_unchanged():
    code = "```python\nrows[0](nothing.md)\n```\n"
    text = f"{code}and [x](04_teacher.ipynb) and [`complete`](https://kdcode.github.io/kdcode/elsewhere.html#complete)"
    shown = site_pages.linked(text, "nbs/03_loss.ipynb", "loss.ipynb", site_pages.find_pages())
    assert shown == f"{code}and [x](teacher.ipynb) and `complete`"


SMALL_MODULE = '''"""Shapes"""
__all__ = ["Shape", "Square", "area", "InvalidShape", "LIMIT"]
LIMIT = 3
@dataclass
class Shape(Settings):
    """A shape."""
    width: float = bounded(0, 9, default=1.5)
    """in metres"""
    names: list[str] = field(default_factory=list)  # of its corners
    @property
    def half(self) -> float:
        """Half of the width."""
    def hidden(self): pass
@dataclass(repr=False)
class Square(Shape):
    """A square."""
    tilt: int = 0  # in degrees
    width: float = 2.0  # of each side
class InvalidShape(ValueError):
    """Not a shape."""
def area(
    shape: Shape | None,  # to measure
    *others, scale: float = 1.0,  # > 0
    deep=(1, 2),
) -> float:  # square metres
    """Return the area.

    Raises nothing.
    """
def private(): pass
'''


@pytest.fixture
def small_module(tmp_path):
    (tmp_path/"small.py").write_text(SMALL_MODULE)
    return library.read_module(tmp_path/"small.py")


def parameter_rows(entry): return [(p.name, p.type, p.default, p.details) for p in entry.parameters]


def test_parameters_are_read_with_their_comments(small_module):
    shape, wrong, area = (small_module.entries[name] for name in ("Shape", "InvalidShape", "area"))
    assert (small_module.text, small_module.constants) == ("Shapes", ["LIMIT"])
    assert list(small_module.entries) == ["Shape", "Square", "InvalidShape", "area"]
    assert parameter_rows(shape) == [("width", "float", "1.5", "in metres"),
                                     ("names", "list[str]", "list()", "of its corners")]
    assert [(m.name, m.kind) for m in shape.methods] == [("half", "property")] and wrong.kind == "exception"
    assert parameter_rows(area) == [("shape", "Shape | None", "", "to measure"), ("*others", "", "", ""),
                                    ("scale", "float", "1.0", "> 0"), ("deep", "", "(1, 2)", "")]
    assert (area.signature, area.summary) == ("shape, *others, scale=1.0, deep=(1, 2)", "Return the area.")
    assert (area.returns.type, area.returns.details) == ("float", "square metres")


def test_inherited_fields_are_listed_in_the_order_of_the_constructor(small_module):
    from kdcode.config import DecodeSettings, TrainSettings
    assert parameter_rows(small_module.entries["Square"]) == [
        ("width", "float", "2.0", "of each side"), ("names", "list[str]", "list()", "of its corners"),
        ("tilt", "int", "0", "in degrees")]
    entries = library.read_module(ROOT/"kdcode"/"config.py").entries
    for settings in (DecodeSettings, TrainSettings):
        listed = [parameter.name for parameter in entries[settings.__name__].parameters]
        assert listed == [field.name for field in dataclasses.fields(settings)]


def words_of(text): return re.sub(r"\W+", " ", text).strip()


def test_messages_quoted_in_the_faq_are_in_the_code():
    """Each message quoted with `kdcode:` is in the library, except for its variable parts (…)."""
    code = re.sub(r'"\s*f?"', "", "".join(path.read_text() for path in (ROOT/"kdcode").glob("*.py")))
    code = words_of(re.sub(r"\{[^{}]*(\{[^{}]*\}[^{}]*)*\}", "…", code))
    faq = (ROOT/"docs"/"faq.md").read_text()
    quoted = [line.removeprefix("kdcode: ") for line in re.findall(r"^kdcode: .*$", faq, re.M)]
    assert len(quoted) > 12
    for message in quoted:
        if message.startswith(("unknown key", "loss.alpha is")): continue  # the next test raises these two
        for part in re.split(r"…|; |'(?:0\.0\.0\.0|cuda)'", message): assert words_of(part) in code, part


def test_faq_quotes_the_errors_of_a_wrong_configuration():
    from kdcode.config import ConfigError, make_config
    faq = (ROOT/"docs"/"faq.md").read_text()
    for values in ({"loss": {"alhpa": 0.3}}, {"loss": {"alpha": 7}}):
        with pytest.raises(ConfigError) as caught: make_config(values)
        assert f"kdcode: {caught.value}\n" in faq


# The built site

@pytest.fixture(scope="session", autouse=True)
def built(request):
    """Fail at once if a test needs the site and it was not built."""
    needed = any(item.get_closest_marker("docs") for item in request.session.items)
    if needed and not (SITE/"index.html").exists(): pytest.fail("_docs contains no site; run make docs")


def broken_links(file, text, repository=ROOT):
    """Return the links of a page that lead nowhere: files and anchors of the site, files and lines on GitHub."""
    page, broken = BeautifulSoup(text, "html.parser"), []
    anchors = {element["id"] for element in page.find_all(id=True)}
    for tag, name in (("a", "href"), ("link", "href"), ("img", "src"), ("script", "src")):
        for element in page.find_all(tag, attrs={name: True}):
            link = element[name]
            if link.startswith(site_pages.GITHUB): broken += [link] if missing_on_github(repository, link) else []
            elif link.startswith(site_pages.HOST) and tag == "a": broken.append(link)  # nbdev's, not resolved
            elif not urlsplit(link).scheme and not is_on_site(file, anchors, link): broken.append(link)
    return broken


def missing_on_github(repository, link):
    path, _, line = link.removeprefix(site_pages.GITHUB).partition("#L")
    match = re.fullmatch(r"/(?:blob|tree)/main/(.+)", path.partition("#")[0])
    if not match: return False
    file = repository/unquote(match[1])
    return not file.exists() or bool(line) and int(line) > len(file.read_text().splitlines())


def is_on_site(file, anchors, link):
    url = urlsplit(urljoin(file, link))
    if posixpath.normpath(posixpath.join(posixpath.dirname(file), urlsplit(link).path)).startswith(".."): return False
    if url.path == file or not url.path: return not url.fragment or unquote(url.fragment) in anchors
    target = SITE/unquote(url.path)
    if not target.is_file(): return False
    return not url.fragment or target.suffix != ".html" or unquote(url.fragment) in anchors_in(unquote(url.path))


@docs
@pytest.mark.parametrize("file", PAGES)
def test_links_work(file): assert broken_links(file, (SITE/file).read_text()) == []


BROKEN_LINKS = ["nothing.html", "teacher.html#nothing", "#nothing", "../loss.html",
                f"{site_pages.GITHUB}/blob/main/kdcode/nothing.py",
                f"{site_pages.GITHUB}/blob/main/kdcode/loss.py#L99999", f"{site_pages.HOST}/loss.html#log_probs"]


@docs
@pytest.mark.parametrize("added, link", [(f'<a href="{link}">x</a>', link) for link in BROKEN_LINKS]
                         + [('<img src="_images/nothing.png">', "_images/nothing.png")])
def test_broken_links_are_found(added, link):
    """Negative control of the test above."""
    text = (SITE/"loss.html").read_text()
    assert broken_links("loss.html", text.replace("</article>", f"{added}</article>")) == [link]


@docs
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_page_has_title_summary_and_links(notebook):
    page, (title, summary) = soup(page_of(notebook)).find("article"), site_pages.title_of(ROOT/notebook)
    plain = lambda text: re.sub(r"[`$\\#“”’'\"*]|\s", "", text)
    assert plain(page.find("h1").text) == plain(title) and page.find("h1") is page.find(re.compile("h[1-6]"))
    assert plain(page.find(class_="summary").text)[:20] == plain(summary)[:20]
    links = {link["href"] for link in page.find_all("a")}
    source = f"{site_pages.GITHUB}/blob/main/{notebook}"
    assert {source, *(launch.launch_link(image, notebook) for image in launch.IMAGES)} <= links
    assert any(link.endswith("glossary.html") for link in links)


@docs
def test_every_page_is_in_the_sidebar():
    names = ["index", *itertools.chain(*site_pages.INDEX.values())]
    sidebars = [soup(f"{name}.html").find(id="pst-primary-sidebar") for name in names]
    links = [link["href"] for sidebar in sidebars for link in sidebar.find_all("a", class_="internal")]
    listed = {urlsplit(urljoin("index.html", link)).path for link in links}
    written = set(PAGES) - GENERATED
    assert written - listed == {"index.html"} or written == listed


@docs
def test_notebook_outputs_are_shown():
    for file in ("decode.html", "loss.html"):
        page = soup(file).find("article")
        assert len(page.select(".cell_output")) > 15 and page.select(".cell_output table")
        assert not re.search(r"^#\|", page.text, re.M)
        assert "show_doc" not in page.text and "AUTOGENERATED" not in page.text
    assert page.select(".cell_output img")


@docs
@pytest.mark.parametrize("file", sorted(set(PAGES) - GENERATED))
def test_no_markup_is_left_unrendered(file):
    """No role, directive, label or equation is shown as source text."""
    page = BeautifulSoup((SITE/file).read_text(), "html.parser").find("article")
    for code in page.select("pre, code, .math, script, style, .cell_output table"): code.decompose()
    assert not re.search(r"\{[a-z:]+\}|:::|\$\$|^\(\w+\.\w+\)=|<!--", page.text, re.M)


@docs
def test_names_of_other_libraries_are_not_linked():
    """`generate` is the method of transformers, not `kdcode.teacher.generate`."""
    article = soup("decode.html").find("article")
    assert not article.select('p a[href$="kdcode.teacher.generate"]')
    assert article.select('p a[href$="kdcode.decode.speculative_generate"]')


@docs
def test_start_page_shows_results_without_code():
    page = soup("index.html").find("article")
    assert page.select(".cell_output table") and not page.select(".cell_input")


def imports_only(code): return site_pages.only_imports(code) if code.strip() and "%" not in code else False


@docs
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_imports_are_collapsed(notebook):
    cells = soup(page_of(notebook)).select("article .cell_input pre")
    imports = [cell for cell in cells if imports_only(cell.text)]
    assert all(cell.find_parent("details") and not cell.find_parent("details").has_attr("open") for cell in imports)
    others = [cell for cell in cells if cell not in imports]
    assert not any(cell.find_parent("details") for cell in others)
    assert imports or notebook.endswith("index.ipynb") or "experiments" in notebook


@docs
def test_parameters_are_shown_in_tables():
    entry = soup("api/decode.html").find(id="kdcode.decode.speculative_generate").parent
    cells = [[cell.text.strip() for cell in row.find_all(["td", "th"])] for row in entry.find("table").find_all("tr")]
    rows = {first: others for first, *others in filter(None, cells)}
    assert rows["parameter"] == ["type", "default", "description"]
    assert rows["gamma"] == ["int", "4", "maximum number of draft tokens per target call"]
    assert rows["input_ids"][0] == "Tensor | list[int] | list[list[int]]"
    assert rows["returns"][0] == "SpeculativeResult | list[SpeculativeResult]"
    links = {link.text: link["href"] for link in entry.find(class_="where").find_all("a")}
    assert links["notebook"].startswith("../decode.html#")
    assert "def speculative_generate" in source_line(links["source"])


def source_line(link):
    path, _, line = link.partition("#L")
    return (ROOT/path.split("/blob/main/")[1]).read_text().splitlines()[int(line) - 1]


@docs
def test_every_public_name_has_an_entry():
    for path in sorted((ROOT/"kdcode").glob("[!_]*.py")):
        page = soup(f"api/{path.stem}.html")
        names = library.read_module(path).entries
        assert [name for name in names if not page.find(id=f"kdcode.{path.stem}.{name}")] == [], path.name


# The site in a browser

MEASURE = """() => {
    const article = document.querySelector("article.bd-article, main")
    const blocks = [...article.querySelectorAll("h1, h2, h3, p, pre, img, table, dt")].filter(element => {
        const isHidden = element.closest("details:not([open])")
        const isEmpty = element.tagName == "P" && !element.textContent.trim()
        return element.getClientRects().length && !isHidden && !isEmpty
    })
    const boxes = blocks.map(element => ({element, box: element.getBoundingClientRect()}))
    boxes.sort((a, b) => a.box.top - b.box.top)
    const overlaps = []
    boxes.forEach(({element, box}, i) => {
        for (let j = i + 1; j < boxes.length && boxes[j].box.top < box.bottom - 3; j++) {
            const other = boxes[j]
            if (element.contains(other.element) || other.element.contains(element)) continue
            const width = Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left)
            const height = Math.min(box.bottom, other.box.bottom) - other.box.top
            if (width > 3 && height > 3)
                overlaps.push([element.textContent.slice(0, 40), other.element.textContent.slice(0, 40)])
        }
    })
    const overflow = document.documentElement.scrollWidth - window.innerWidth
    return {overlaps, overflow, letters: article.innerText.length}
}"""


@pytest.fixture(scope="module")
def address():
    """Serve the site in a thread; return its address."""
    handler = type("QuietHandler", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(browser, address):
    """Open a page. At the end, assert that the console has no warnings, no file was missing, none was external."""
    contexts, problems, external = [], [], set()

    def on_console(message):
        if message.type in ("error", "warning"): problems.append(message.text)

    def on_response(response):
        if response.status >= 400: problems.append(f"{response.status} {response.url}")

    def on_request(request):
        if not request.url.startswith((address, "data:", "blob:")): external.add(request.url)

    def visit(file, width=1600, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("response", on_response)
        page.on("request", on_request)
        page.goto(f"{address}/{file}", wait_until="load")
        page.evaluate("window.MathJax?.startup?.promise")
        return page
    yield visit
    for context in contexts: context.close()
    assert problems == [] and external == set()


@docs
@needs_browser
@pytest.mark.parametrize("file", PAGES)
def test_page_fits_wide_and_narrow_windows(visit, file):
    """No blocks overlap, nothing is wider than the window, and every equation is typeset."""
    page = visit(file)
    for width in (1600, 400):
        page.set_viewport_size({"width": width, "height": 900})
        layout = page.evaluate(MEASURE)
        assert (layout["overlaps"], max(layout["overflow"], 0)) == ([], 0), f"at {width} pixels"
        assert layout["letters"] > 40 or file == "search.html"
    assert page.locator("article mjx-container").count() == page.locator("article .math").count()
    assert page.locator("mjx-merror, [data-mml-node=merror]").count() == 0


@docs
@needs_browser
def test_overflow_and_overlaps_are_measured(visit):
    """Negative control of the test above."""
    page = visit("loss.html", width=400)
    def append(paragraph):
        page.evaluate("html => document.querySelector('article').insertAdjacentHTML('beforeend', html)", paragraph)
    append('<p style="width: 900px">wide</p>')
    assert page.evaluate(MEASURE)["overflow"] > 0
    append('<p style="margin-top: -1.5em">over the line above</p>')
    assert page.evaluate(MEASURE)["overlaps"]


@docs
@needs_browser
def test_wide_code_and_tables_scroll(visit):
    page = visit("decode.html", width=400)
    blocks = ("pre", ".pst-scrollable-table-container", ".text_html", ".cell_output .output")
    wide = page.locator(", ".join(f"article {block}" for block in blocks)).evaluate_all(
        "all => all.filter(it => it.scrollWidth > it.clientWidth + 1).map(it => getComputedStyle(it).overflowX)")
    assert len(wide) > 10 and set(wide) <= {"auto", "scroll"}


@docs
@needs_browser
def test_search_finds_functions_and_words(visit):
    page = visit("search.html?q=speculative_generate")
    page.wait_for_selector("#search-results li a")
    page.locator("#search-results li a", has_text="speculative_generate").first.click()
    page.wait_for_load_state()
    assert "kdcode.decode.speculative_generate" in page.url
    page = visit("index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("rejection")
    page.keyboard.press("Enter")
    page.locator("#search-results li a", has_text="Speculative decoding").first.wait_for()


def results_of(page):
    """Wait for the excerpts of a search; return the link and the excerpt ("" for a name of the API) of each result."""
    page.wait_for_selector("#search-results li p.context")
    page.wait_for_load_state("networkidle")
    return page.locator("#search-results li").evaluate_all("""all => all.map(result =>
        [result.querySelector("a").getAttribute("href"), result.querySelector("p.context")?.textContent ?? ""])""")


@docs
@needs_browser
def test_excerpts_of_a_search_have_no_labels_of_collapsed_cells(visit):
    assert not [text for _, text in results_of(visit("search.html?q=install")) if "Imports" in text]


def words_on(file): return set(soup(file).find("article").text.replace("#", " ").split())


@docs
@needs_browser
@pytest.mark.parametrize("term, entry", [("acceptance rate", "acceptance-rate"), ("gamma", "draft-length-gamma")])
def test_search_finds_the_explanation_of_a_term_first(visit, term, entry):
    """The glossary's entry comes first, then lesson 1. Excerpts have whole words, no TeX and no navigation."""
    results = results_of(visit(f"search.html?q={term}"))
    pages = [re.sub(r"\?[^#]*", "", link) for link, _ in results]
    assert pages[:2] == [f"glossary.html#{entry}", "tutorials/speculative_decoding.html"]
    assert "glossary.html" not in pages
    excerpts = [(page.partition("#")[0], text) for page, (_, text) in zip(pages, results) if text]
    assert len(excerpts) > 20
    assert [text for _, text in excerpts if re.search(r"[\\$]|Σ_|Contents", text)] == []
    ends = [(file, text.strip("… ").split()[place]) for file, text in excerpts for place in (0, -1)]
    plain = [(file, word) for file, word in ends if re.fullmatch("[A-Za-z]+", word)]  # not an equation
    assert len(plain) > 20 and [(file, word) for file, word in plain if word not in words_on(file)] == []


@docs
@needs_browser
def test_start_picture_is_readable_on_a_phone(visit):
    """Its letters are 13 pixels high at its full width."""
    page = visit("index.html", width=390)
    shown, natural = page.locator("article img").first.evaluate(
        "async image => { await image.decode(); return [image.clientWidth, image.naturalWidth / 2] }")
    assert 13 * shown / natural > 10


@docs
@needs_browser
def test_copy_button_copies_code(visit):
    page = visit("install.html", permissions=["clipboard-read", "clipboard-write"])
    block = page.locator("div.highlight", has_text="git clone").first
    block.hover()
    block.locator("button.copybtn").click()
    assert page.evaluate("navigator.clipboard.readText()").splitlines()[1:3] == ["cd kdcode", "make setup"]


LUMINANCES = """element => {
    const colour = (of, property) => getComputedStyle(of)[property].match(/[\\d.]+/g).map(Number)
    const blend = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i])
    const background = of =>
        of ? blend(colour(of, "backgroundColor"), background(of.parentElement)) : [255, 255, 255]
    const luminance = channels => {
        const [r, g, b] = channels.map(c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
        return .2126 * r + .7152 * g + .0722 * b
    }
    return [luminance(blend(colour(element, "color"), background(element))), luminance(background(element))]
}"""


def contrast(element):
    """Return the contrast of an element's text with its background (WCAG 2), and the background's luminance."""
    text, background = element.evaluate(LUMINANCES)
    return (max(text, background) + .05) / (min(text, background) + .05), background


def first_paragraph(page): return page.locator("article p").first


@docs
@needs_browser
def test_light_and_dark_theme(visit):
    page = visit("loss.html")
    assert contrast(first_paragraph(page))[1] > .5
    for mode, fits in (("dark", lambda luminance: luminance < .1), ("light", lambda luminance: luminance > .5)):
        page.locator(".theme-switch-button:visible").click()
        page.locator(f".theme-change-button[data-mode={mode}]:visible").click()
        page.wait_for_selector(f"html[data-theme={mode}]")
        ratio, luminance = contrast(first_paragraph(page))
        assert ratio > 7 and fits(luminance)


IS_OPAQUE = """async image => {
    await image.decode()
    const canvas = document.createElement("canvas")
    Object.assign(canvas, {width: image.naturalWidth, height: image.naturalHeight})
    const context = canvas.getContext("2d")
    context.drawImage(image, 0, 0)
    return context.getImageData(1, 1, 1, 1).data[3] == 255
}"""


@docs
@needs_browser
@pytest.mark.parametrize("file", ["loss.html", "train.html", "index.html", "experiments/divergences.html"])
def test_plots_have_a_light_background_in_the_dark_theme(visit, file):
    """Plots have dark lines: each image is opaque, or its background is light."""
    page = visit(file, color_scheme="dark")
    assert contrast(first_paragraph(page))[1] < .1
    plots = page.locator("article img").all()
    assert plots
    for plot in plots: assert plot.evaluate(IS_OPAQUE) or contrast(plot)[1] > .6


@docs
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_coloured_tokens_are_readable(visit, scheme):
    """Coloured tokens are outputs of the notebooks, which set their own background colours."""
    page = visit("decode.html", color_scheme=scheme)
    spans = page.locator("article .cell_output .text_html span[style*=background]").all()
    assert len(spans) > 10
    for span in spans[:40]: assert contrast(span)[0] > 4.5
