"""The docs site: what it is made from, and, after `make docs` has built it, every page in a real browser.

Tests marked `docs` want the built site in `_docs/`; make docs runs them."""
import functools
import json
import posixpath
import re
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
SITE = ROOT/"_docs"
sys.path[:0] = [str(ROOT/"docs"), str(ROOT/"onyxia")]
import launch
import library
import pages as site_pages

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
docs = pytest.mark.docs
browsed = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for folder in ("", "tutorials", "experiments") for path in (ROOT/"nbs"/folder).glob("*.ipynb"))
GENERATED = {"search.html", "genindex.html", "py-modindex.html"}
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)


@functools.cache
def soup(file): return BeautifulSoup((SITE/file).read_text(), "html.parser")


@functools.cache
def anchors_of(file): return {element["id"] for element in soup(file).find_all(id=True)}


def page_of(notebook): return f"{site_pages.name_of(notebook)}.html"


# What the site is made from

@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_title_has_a_cell_of_its_own(notebook):
    """nbdev makes a page's title of the whole first cell: what else stands there is lost."""
    first = "".join(json.loads((ROOT/notebook).read_text())["cells"][0]["source"])
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+\n?", first), f"{notebook}: put the title and its summary into a cell of their own"


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_which_alpha_is_meant_is_said_first(notebook):
    """The weight α of the loss and the acceptance rate α: the first paragraph with the letter says which."""
    cells = json.loads((ROOT/notebook).read_text())["cells"]
    paragraphs = [part for cell in cells if cell["cell_type"] == "markdown" for part in "".join(cell["source"]).split("\n\n")]
    first = next((i for i, part in enumerate(paragraphs) if re.search(r"α|\\alpha", part)), None)
    if first is not None: assert re.search("acceptance|accepted|loss", " ".join(paragraphs[max(first - 1, 0):first + 2])), paragraphs[first]


def test_every_notebook_is_a_page():
    found = site_pages.find_pages()
    assert set(NOTEBOOKS) <= set(found) and len(NOTEBOOKS) > 40
    assert {"docs/faq.md", "docs/glossary.md", "models/smollm2-135m-draft/README.md"} <= set(found)
    assert len({page.name for page in found.values()}) == len(found)
    assert found["nbs/02a_reading.ipynb"].name == "reading" and found["nbs/tutorials/06b_vllm.ipynb"].name == "tutorials/vllm"


def test_links_of_the_repository_become_links_of_the_site():
    found = site_pages.find_pages()
    def at(link, place="nbs/experiments/02_reads.ipynb"): return site_pages.address(link, place, found[place].file, found)
    assert at("../03_loss.ipynb") == "../loss.ipynb" and at("../index.ipynb#The-demo") == "../index.ipynb#the-demo"
    assert at("../../README.md") == "../index.ipynb" and at("https://example.org/a") == "https://example.org/a"
    assert at("../../docs/glossary.md#near-tie") == "../glossary.md#near-tie"
    assert at("../../results/steps/report.md") == f"{site_pages.GITHUB}/blob/main/results/steps/report.md"
    assert at("../../configs") == f"{site_pages.GITHUB}/tree/main/configs"
    assert at("CONTRIBUTING.md", "nbs/index.ipynb") == "contributing.md"  # the index is the README too
    for wrong in ("../nothing.ipynb", "../../results/nothing/report.md", "../../../outside"):
        with pytest.raises(SystemExit, match="isn't there"): at(wrong)


def test_quarto_is_told_of_every_notebook():
    """For readers who type nbdev_preview: the settings agree with nbdev's, and the patterns leave nothing out."""
    quarto, settings = yaml.safe_load((ROOT/"nbs"/"_quarto.yml").read_text()), site_pages.SETTINGS
    website, folder = quarto["website"], ROOT/"nbs"
    assert (website["title"], website["description"], website["repo-url"], website["repo-branch"]) == (settings["title"], settings["description"], settings["git_url"], settings["branch"])
    assert website["site-url"] == settings["doc_host"] + settings["doc_baseurl"] and quarto["project"]["output-dir"] == settings["doc_path"]
    patterns = [item["contents"] if isinstance(item, dict) else item for item in website["sidebar"]["contents"]]
    for given in (quarto["project"]["render"], patterns): assert {path.relative_to(ROOT).as_posix() for pattern in given for path in folder.glob(pattern)} == set(NOTEBOOKS)


def test_code_is_no_link():
    found, place = site_pages.find_pages(), "nbs/03_loss.ipynb"
    text = "```python\nrows[0](nothing.md)\n```\nand [x](04_teacher.ipynb) and [`complete`](https://kdcode.github.io/kdcode/elsewhere.html#complete)"
    assert site_pages.linked(text, place, "loss.ipynb", found) == "```python\nrows[0](nothing.md)\n```\nand [x](teacher.ipynb) and `complete`"


def test_parameters_are_read_with_their_comments(tmp_path):
    (tmp_path/"small.py").write_text('''"""What it does"""
__all__ = ["Shape", "area", "Wrong", "LIMIT"]
LIMIT = 3
@dataclass
class Shape(Settings):
    """A shape."""
    width: float = within(0, 9, default=1.5)
    """in metres"""
    names: list[str] = field(default_factory=list)  # of its corners
    @property
    def half(self) -> float:
        """Half of it."""
    def hidden(self): pass
class Wrong(ValueError):
    """It is wrong."""
def area(
    shape: Shape | None,  # that is measured
    *others, scale: float = 1.0,  # > 0
    deep=(1, 2),
) -> float:  # square metres
    """Its area.

    Raises nothing.
    """
def private(): pass
''')
    module = library.read_module(tmp_path/"small.py")
    shape, wrong, area = (module.entries[name] for name in ("Shape", "Wrong", "area"))
    assert (module.text, module.constants, list(module.entries)) == ("What it does", ["LIMIT"], ["Shape", "Wrong", "area"])
    assert [(p.name, p.type, p.default, p.details) for p in shape.parameters] == [("width", "float", "1.5", "in metres"), ("names", "list[str]", "list()", "of its corners")]
    assert [(m.name, m.kind) for m in shape.methods] == [("half", "property")] and wrong.kind == "exception"
    assert [(p.name, p.type, p.default, p.details) for p in area.parameters] == [("shape", "Shape | None", "", "that is measured"), ("*others", "", "", ""), ("scale", "float", "1.0", "> 0"), ("deep", "", "(1, 2)", "")]
    assert (area.signature, area.summary, area.returns.type, area.returns.details) == ("shape, *others, scale=1.0, deep=(1, 2)", "Its area.", "float", "square metres")


def test_messages_among_the_questions_are_the_library_s_own():
    """A message that is quoted with `kdcode:` stands in the code, but for the parts that change (…)."""
    code = re.sub(r'"\s*f?"', "", "".join(path.read_text() for path in (ROOT/"kdcode").glob("*.py")))
    written = re.sub(r"\{[^{}]*(\{[^{}]*\}[^{}]*)*\}", "…", code)
    quoted = [line.removeprefix("kdcode: ") for line in re.findall(r"^kdcode: .*$", (ROOT/"docs"/"faq.md").read_text(), re.M)]
    assert len(quoted) > 12
    for message in quoted:
        if message.startswith(("unknown key", "loss.alpha is")): continue  # tested by running, below
        for part in re.split(r"…|; |'(?:0\.0\.0\.0|cuda)'", message):
            assert re.sub(r"\W+", " ", part).strip() in re.sub(r"\W+", " ", written), part


def test_mistakes_in_a_configuration_are_answered_as_quoted():
    from kdcode.config import ConfigError, make_config
    quoted = (ROOT/"docs"/"faq.md").read_text()
    for values in ({"loss": {"alhpa": 0.3}}, {"loss": {"alpha": 7}}):
        with pytest.raises(ConfigError) as caught: make_config(values)
        assert f"kdcode: {caught.value}\n" in quoted


# The built site

@pytest.fixture(scope="session", autouse=True)
def built(request):
    if any(item.get_closest_marker("docs") for item in request.session.items) and not (SITE/"index.html").exists(): pytest.fail("there is no site in _docs; run make docs")


def broken_links(file, text, repository=ROOT):
    """What a page points to that isn't there: files and anchors of the site, and files and lines of the repository."""
    page, wrong = BeautifulSoup(text, "html.parser"), []
    anchors = {element["id"] for element in page.find_all(id=True)}
    for tag, name in (("a", "href"), ("link", "href"), ("img", "src"), ("script", "src")):
        for element in page.find_all(tag, attrs={name: True}):
            link = element[name]
            if link.startswith(site_pages.GITHUB): wrong += [link] if absent_in(repository, link) else []
            elif link.startswith(site_pages.HOST) and tag == "a": wrong.append(link)  # of nbdev, left unresolved
            elif not urlsplit(link).scheme and not holds(file, anchors, link): wrong.append(link)
    return wrong


def absent_in(repository, link):
    path, _, line = link.removeprefix(site_pages.GITHUB).partition("#L")
    match = re.fullmatch(r"/(?:blob|tree)/main/(.+)", path.partition("#")[0])
    if not match: return False
    file = repository/unquote(match[1])
    return not file.exists() or bool(line) and int(line) > len(file.read_text().splitlines())


def holds(file, anchors, link):
    place = urlsplit(urljoin(file, link))
    if posixpath.normpath(posixpath.join(posixpath.dirname(file), urlsplit(link).path)).startswith(".."): return False
    if place.path == file or not place.path: return not place.fragment or unquote(place.fragment) in anchors
    target = SITE/unquote(place.path)
    if not target.is_file(): return False
    return not place.fragment or target.suffix != ".html" or unquote(place.fragment) in anchors_of(unquote(place.path))


@docs
@pytest.mark.parametrize("file", PAGES)
def test_every_link_holds(file): assert broken_links(file, (SITE/file).read_text()) == []


@docs
def test_a_broken_link_would_be_found():
    text = (SITE/"loss.html").read_text()
    for wrong in ("nothing.html", "teacher.html#nothing", "#nothing", "../loss.html", f"{site_pages.GITHUB}/blob/main/kdcode/nothing.py", f"{site_pages.GITHUB}/blob/main/kdcode/loss.py#L99999", f"{site_pages.HOST}/loss.html#log_probs"):
        assert broken_links("loss.html", text.replace("</article>", f'<a href="{wrong}">x</a></article>')) == [wrong]
    assert broken_links("loss.html", text.replace("</article>", '<img src="_images/nothing.png"></article>')) == ["_images/nothing.png"]


@docs
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_has_its_page(notebook):
    page, (title, summary) = soup(page_of(notebook)).find("article"), site_pages.title_of(ROOT/notebook)
    plain = lambda text: re.sub(r"[`$\\#“”’'\"*]|\s", "", text)
    assert plain(page.find("h1").text) == plain(title) and page.find("h1") is page.find(re.compile("h[1-6]"))
    assert plain(page.find(class_="summary").text)[:20] == plain(summary)[:20]
    links = {link["href"] for link in page.find_all("a")}
    assert {launch.launch_link(image, notebook) for image in launch.IMAGES} | {f"{site_pages.GITHUB}/blob/main/{notebook}"} <= links
    assert any(link.endswith("glossary.html") for link in links)


@docs
def test_every_page_is_in_the_contents():
    contents = {urlsplit(urljoin("index.html", link["href"])).path for name in ("index", "lessons", "how", "answers", "api") for link in soup(f"{name}.html").find(id="pst-primary-sidebar").find_all("a", class_="internal")}
    assert set(PAGES) - GENERATED - contents == {"index.html"} or set(PAGES) - GENERATED == contents


@docs
def test_outputs_of_a_notebook_are_shown():
    page = soup("speculative.html").find("article")
    outputs = page.select(".cell_output")
    assert len(outputs) > 15 and page.select(".cell_output img") and page.select(".cell_output table")
    assert not re.search(r"^#\|", page.text, re.M) and "show_doc" not in page.text and "AUTOGENERATED" not in page.text


@docs
@pytest.mark.parametrize("file", sorted(set(PAGES) - GENERATED))
def test_nothing_is_left_unrendered(file):
    """No role, directive, label or equation in its own letters."""
    page = BeautifulSoup((SITE/file).read_text(), "html.parser").find("article")
    for code in page.select("pre, code, .math, script, style"): code.decompose()
    assert not re.search(r"\{[a-z:]+\}|:::|\$\$|^\(\w+\.\w+\)=|<!--", page.text, re.M)


@docs
def test_a_word_that_is_another_library_s_is_no_link():
    assert not soup("speculative.html").find("article").select('p a[href$="kdcode.teacher.generate"]')
    assert soup("speculative.html").find("article").select('p a[href$="kdcode.speculative.speculative_generate"]')


@docs
def test_the_start_page_shows_results_without_their_code():
    page = soup("index.html").find("article")
    assert page.select(".cell_output table") and not page.select(".cell_input")


@docs
def test_parameters_stand_in_tables():
    entry = soup("api/speculative.html").find(id="kdcode.speculative.speculative_generate").parent
    rows = {cells[0]: cells[1:] for row in entry.find("table").find_all("tr") if (cells := [cell.text.strip() for cell in row.find_all(["td", "th"])])}
    assert rows["parameter"] == ["type", "default", "meaning"] and rows["gamma"] == ["int", "4", "tokens drafted for each call of the teacher, at most"]
    assert rows["input_ids"][0] == "Tensor | list[int] | list[list[int]]" and rows["returns"][0] == "SpeculativeResult | list[SpeculativeResult]"
    links = {link.text: link["href"] for link in entry.find(class_="where").find_all("a")}
    assert links["explained"].startswith("../speculative.html#") and "def speculative_generate" in line_of(links["source"])


def line_of(link):
    path, _, line = link.partition("#L")
    return (ROOT/path.split("/blob/main/")[1]).read_text().splitlines()[int(line) - 1]


@docs
def test_every_public_name_has_its_entry():
    for path in sorted((ROOT/"kdcode").glob("[!_]*.py")):
        page = soup(f"api/{path.stem}.html")
        missing = [name for name in library.read_module(path).entries if not page.find(id=f"kdcode.{path.stem}.{name}")]
        assert missing == [], path.name


# In the browser

MEASURE = """() => {
    const article = document.querySelector("article.bd-article, main")
    const blocks = [...article.querySelectorAll("h1, h2, h3, p, pre, img, table, dt")].filter(element => {
        const hidden = element.closest("details:not([open])")
        return element.getClientRects().length && !hidden && !(element.tagName == "P" && !element.textContent.trim())
    })
    const boxes = blocks.map(element => ({element, box: element.getBoundingClientRect()})).sort((a, b) => a.box.top - b.box.top)
    const over = []
    boxes.forEach(({element, box}, i) => {
        for (let j = i + 1; j < boxes.length && boxes[j].box.top < box.bottom - 3; j++) {
            const other = boxes[j]
            if (element.contains(other.element) || other.element.contains(element)) continue
            if (Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left) > 3 && Math.min(box.bottom, other.box.bottom) - other.box.top > 3)
                over.push([element.textContent.slice(0, 40), other.element.textContent.slice(0, 40)])
        }
    })
    return {over, wider: document.documentElement.scrollWidth - window.innerWidth, letters: article.innerText.length}
}"""


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}), directory=str(SITE))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    engine = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with engine.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens a page; at the end the console had nothing to complain of, nothing was missing and nothing came from elsewhere."""
    contexts, complaints, elsewhere = [], [], set()

    def visit(file, width=1600, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("response", lambda response: complaints.append(f"{response.status} {response.url}") if response.status >= 400 else None)
        page.on("request", lambda request: elsewhere.add(request.url) if not request.url.startswith((address, "data:", "blob:")) else None)
        page.goto(f"{address}/{file}", wait_until="load")
        page.evaluate("window.MathJax?.startup?.promise")
        return page
    yield visit
    for context in contexts: context.close()
    assert complaints == [] and elsewhere == set()


@docs
@browsed
@pytest.mark.parametrize("file", PAGES)
def test_page_is_readable_wide_and_narrow(visit, file):
    page = visit(file)
    for width in (1600, 400):
        page.set_viewport_size({"width": width, "height": 900})
        found = page.evaluate(MEASURE)
        assert (found["over"], max(found["wider"], 0)) == ([], 0), f"at {width} pixels"
        assert found["letters"] > 40 or file == "search.html"
    assert page.locator("article mjx-container").count() == page.locator("article .math").count() and page.locator("mjx-merror, [data-mml-node=merror]").count() == 0


@docs
@browsed
def test_an_unreadable_page_would_be_found(visit):
    page = visit("loss.html", width=400)
    page.evaluate("document.querySelector('article').insertAdjacentHTML('beforeend', '<p style=\"width: 900px\">wide</p>')")
    assert page.evaluate(MEASURE)["wider"] > 0
    page.evaluate("document.querySelector('article').insertAdjacentHTML('beforeend', '<p style=\"margin-top: -1.5em\">over the line above</p>')")
    assert page.evaluate(MEASURE)["over"]


@docs
@browsed
def test_wide_code_and_tables_scroll_by_themselves(visit):
    page = visit("speculative.html", width=400)
    wider = page.locator("article pre, article .pst-scrollable-table-container, article .text_html, article .cell_output .output").evaluate_all("all => all.filter(it => it.scrollWidth > it.clientWidth + 1).map(it => getComputedStyle(it).overflowX)")
    assert len(wider) > 10 and set(wider) <= {"auto", "scroll"}


@docs
@browsed
def test_search_finds_a_function_and_a_word(visit):
    page = visit("search.html?q=speculative_generate")
    page.wait_for_selector("#search-results li a")
    page.locator("#search-results li a", has_text="speculative_generate").first.click()
    page.wait_for_load_state()
    assert "kdcode.speculative.speculative_generate" in page.url
    page = visit("index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("rejection")
    page.keyboard.press("Enter")
    page.locator("#search-results li a", has_text="Speculative decoding").first.wait_for()


@docs
@browsed
def test_code_is_copied(visit):
    page = visit("install.html", permissions=["clipboard-read", "clipboard-write"])
    block = page.locator("div.highlight", has_text="git clone").first
    block.hover()
    block.locator("button.copybtn").click()
    assert page.evaluate("navigator.clipboard.readText()").splitlines()[1:3] == ["cd kdcode", "make setup"]


LUMINANCES = """element => {
    const colour = (of, property) => getComputedStyle(of)[property].match(/[\\d.]+/g).map(Number)
    const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i])
    const ground = of => of ? over(colour(of, "backgroundColor"), ground(of.parentElement)) : [255, 255, 255]
    const luminance = channels => {
        const [r, g, b] = channels.map(c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
        return .2126 * r + .7152 * g + .0722 * b
    }
    return [luminance(over(colour(element, "color"), ground(element))), luminance(ground(element))]
}"""


def contrast(element):
    """Of an element's letters with what is behind them, and how light that is."""
    ink, ground = element.evaluate(LUMINANCES)
    return (max(ink, ground) + .05) / (min(ink, ground) + .05), ground


def text_of(page): return page.locator("article p").first


@docs
@browsed
def test_light_and_dark(visit):
    page = visit("loss.html")
    assert contrast(text_of(page))[1] > .5
    for mode, is_paper in (("dark", lambda ground: ground < .1), ("light", lambda ground: ground > .5)):
        page.locator(".theme-switch-button:visible").click()
        page.locator(f".theme-change-button[data-mode={mode}]:visible").click()
        page.wait_for_selector(f"html[data-theme={mode}]")
        ratio, ground = contrast(text_of(page))
        assert ratio > 7 and is_paper(ground)


OPAQUE = """async image => {
    await image.decode()
    const canvas = Object.assign(document.createElement("canvas"), {width: image.naturalWidth, height: image.naturalHeight}), pen = canvas.getContext("2d")
    pen.drawImage(image, 0, 0)
    return pen.getImageData(1, 1, 1, 1).data[3] == 255
}"""


@docs
@browsed
@pytest.mark.parametrize("file", ["loss.html", "speculative.html", "index.html", "experiments/divergences.html"])
def test_plots_stay_on_light_paper_in_the_dark(visit, file):
    """Their ink is dark: each picture is opaque, or has a light ground."""
    page = visit(file, color_scheme="dark")
    assert contrast(text_of(page))[1] < .1
    plots = page.locator("article img").all()
    assert plots
    for plot in plots: assert plot.evaluate(OPAQUE) or contrast(plot)[1] > .6


@docs
@browsed
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_coloured_text_is_readable(visit, scheme):
    """Tokens in colour come from the notebooks as they are, with grounds of their own."""
    page = visit("speculative.html", color_scheme=scheme)
    spans = page.locator("article .cell_output .text_html span[style*=background]").all()
    assert len(spans) > 10
    for span in spans[:40]: assert contrast(span)[0] > 4.5
