"""The pages of the site, as Sphinx reads them: the notebooks as nbdev has processed them, the Markdown of this folder, and a page of the API for each module.

`nbdev_proc_nbs` writes `_proc/`; this script writes `_proc/_site/` from it. A link is written as it holds in the repository (`../results/steps/report.md`);
here it becomes a link to a page where there is one, and to GitHub otherwise. A link to what isn't there is an error.
"""
import json
import os
import posixpath
import re
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import nbformat
import yaml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT/"onyxia"), str(ROOT/"docs"), str(ROOT)]
import kdcode
from launch import launch_link
from library import Parameter, read_module

PROCESSED, SITE = ROOT/"_proc", ROOT/"_proc"/"_site"
parser = ConfigParser()
parser.read(ROOT/"settings.ini")
SETTINGS = parser["DEFAULT"]  # the authority on addresses
GITHUB, BRANCH, HOST = SETTINGS["git_url"], SETTINGS["branch"], SETTINGS["doc_host"] + SETTINGS["doc_baseurl"]
WRITTEN = set()  # files of the site


@dataclass
class Page:
    source: str  # in the repository
    name: str    # on the site, without an ending
    title: str
    summary: str

    @property
    def file(self): return self.name + Path(self.source).suffix


# What there is

def title_of(path):
    """Title and summary of a notebook or a Markdown file: a first heading, and a quote below it."""
    if path.suffix == ".ipynb": text = "".join(json.loads(path.read_text())["cells"][0]["source"])
    else: text = path.read_text()
    title = re.search(r"^# (.+)$", text, re.M)
    if not title: raise SystemExit(f"{path.relative_to(ROOT)} has no title; begin it with a line such as: # Title")
    summary = re.match(r"\s*^> (.+)$", text[title.end():], re.M)
    return title[1], summary[1] if summary else ""


def name_of(source):
    """The name that nbdev gives a notebook's page, which is its file's without the number."""
    folder, file = posixpath.split(source.removeprefix("nbs/"))
    return posixpath.join(folder, re.sub(r"^\d+[a-z]?_", "", Path(file).stem))


def find_pages():
    """Everything that has a page, by its place in the repository."""
    notebooks = sorted(path for path in (ROOT/"nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts))
    names = {path: name_of(path.relative_to(ROOT).as_posix()) for path in notebooks}
    names |= {path: path.stem for path in sorted((ROOT/"docs").glob("*.md"))}
    names |= {path: f"models/{path.parent.name}" for path in sorted((ROOT/"models").glob("*/README.md"))}
    names |= {ROOT/file: Path(file).stem.lower() for file in ("CONTRIBUTING.md", "CHANGELOG.md")}
    if twice := [path for path, name in names.items() if list(names.values()).count(name) > 1]: raise SystemExit(f"these would be one page: {', '.join(str(path.relative_to(ROOT)) for path in twice)}; rename one")
    return {(place := path.relative_to(ROOT).as_posix()): Page(place, name, *title_of(path)) for path, name in names.items()}


# Links

def resolve(link, place):
    """The file or folder of the repository that a link in a file names. The index is the README too, so its links may begin at the root."""
    for start in [posixpath.dirname(place)] + ([""] if place == "nbs/index.ipynb" else []):
        path = posixpath.normpath(posixpath.join(start, link))
        if (ROOT/path).exists() and not path.startswith(".."): return "nbs/index.ipynb" if path == "README.md" else path
    raise SystemExit(f"{place} links to {link}, which isn't there")


def address(link, place, page, pages, image=False):
    """A link of the repository, as it holds on the site."""
    if re.match(r"[a-z]+:|#", link): return link
    path, _, anchor = link.partition("#")
    path, anchor = resolve(path, place), anchor and f"#{anchor.lower()}"
    if image: return relative(copied(path), page)
    if path in pages: return relative(pages[path].file, page) + anchor
    return f"{GITHUB}/{'tree' if (ROOT/path).is_dir() else 'blob'}/{BRANCH}/{path}{anchor}"


def relative(file, page): return posixpath.relpath(file, posixpath.dirname(page) or ".")


def copied(path):
    """A file of the repository, beside the pages that show it."""
    write(path, (ROOT/path).read_bytes())
    return path


def without_code(change, markdown):
    """Applies a change to all that is neither a block of code nor code in a line."""
    parts = re.split(r"(^```.*?^```[^\S\n]*$|`+[^`\n]+`+)", markdown, flags=re.M | re.S)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def linked(markdown, place, page, pages, roles=True):
    """Markdown with its links and pictures as they hold on the site; nbdev's links to its pages of names become references to the API, or plain code where such can't stand."""
    markdown = re.sub(rf"\[`([^`]+)`\]\({re.escape(HOST)}/(\S+?)\)", lambda m: reference(m[1], m[2]) if roles else f"`{m[1]}`", markdown)
    change = lambda text: re.sub(r"(!?)(\[[^\[\]]*\]|\])\(([^()\s]+)\)", lambda m: f"{m[1]}{m[2]}({address(m[3], place, page, pages, image=bool(m[1]))})", text)
    # a link's text may hold code, so only blocks of code are left alone
    parts = re.split(r"(^```.*?^```[^\S\n]*$)", markdown, flags=re.M | re.S)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


NAMES = {}  # by nbdev's address, such as loss.html#log_probs: kdcode.loss.log_probs


def reference(text, target):
    """A name in the API, or plain code where it has no entry. A mere word, such as `generate`, may be another library's."""
    ours = target in NAMES and re.search(r"[A-Z_.]", text)
    return f"{{py:obj}}`{text} <{NAMES[target]}>`" if ours else f"`{text}`"


# Notebooks

def notebook_page(page, pages):
    """A notebook as a page: its title with links below it, its cells, and where a name is defined a place that the API leads to."""
    processed = PROCESSED/Path(page.source).relative_to("nbs")
    notebook = nbformat.read(processed, as_version=4)
    cells = []
    for cell in notebook.cells[1:]:  # the first is nbdev's title
        cell.metadata.pop("language", None)
        if shown := re.search(r"^show_doc\((\S+)\)$", cell.source, re.M): define(cells, page.name, shown[1])
        elif keep(cell): cells.append(presented(cell, page, pages))
    text = "".join(notebook.cells[0].source)
    front = yaml.safe_load(text.strip().strip("-"))
    notebook.cells = [nbformat.v4.new_markdown_cell(heading(front["title"], front.get("description", ""), page)), *cells]
    if page.name == "index": notebook.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(contents(names, caption=caption) for caption, names in INDEX.items())))
    for number, cell in enumerate(notebook.cells): cell.id = f"cell-{number}"  # the same in every build
    write(page.file, nbformat.writes(notebook).encode())


def keep(cell): return cell.source.strip() and not cell.source.startswith("<!--")


def presented(cell, page, pages):
    """A cell without directives, its links made to hold."""
    if cell.cell_type == "markdown": cell.source = linked(cell.source, page.source, page.file, pages)
    if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    if cell.cell_type == "code" and page.name == "index": cell.metadata["tags"] = ["remove-input"]  # as in the README
    for output in cell.get("outputs", []):
        if text := output.get("data", {}).get("text/markdown"): output["data"]["text/markdown"] = linked("".join(text), page.source, page.file, pages, roles=False)
    return cell


def define(cells, module, name):
    """Below the code that defines names, a line that leads to them in the API; above it, the places that are led to."""
    entry = f"{{py:obj}}`{name} <kdcode.{module}.{name}>`"
    place = f"({label(module, name)})=\n" + anchor(name) * (anchor(name) not in "".join(cell.source for cell in cells))
    if cells[-1].metadata.get("defines"):
        cells[-1].source = cells[-1].source.replace("API: ", f"API: {entry} · ")  # nbdev has them in reverse
        cells[-3].source += f"\n{place}"
        return
    cells[-1:] = [nbformat.v4.new_markdown_cell(place), cells[-1], nbformat.v4.new_markdown_cell(f"{{.defines}}\nAPI: {entry}", metadata={"defines": True})]


def label(module, name):
    """Of the place where a name is explained. Labels have no capitals, and a class and a function may differ in nothing else."""
    return f"{module}.{'class' if name[0].isupper() else 'name'}.{name.lower()}"


def anchor(name):
    """The place that nbdev's links from elsewhere lead to."""
    return f'<span id="{name.lower()}"></span>\n'


def heading(title, summary, page):
    """The title, the summary, and where the notebook can be opened."""
    opened = [f"[Open in JupyterLab on Onyxia]({launch_link('jupyter-pytorch', page.source)})", f"[with a GPU]({launch_link('jupyter-pytorch-gpu', page.source)})",
              f"[Notebook]({GITHUB}/blob/{BRANCH}/{page.source})", f"[Symbols and words]({relative('glossary.md', page.file)})"]
    return f"# {title}\n\n{{.summary}}\n{summary}\n\n{{.page-links}}\n{' · '.join(opened)}\n"


# Markdown

def contents(names, hidden=True, **options):
    """A table of contents for the sidebar."""
    lines = [":hidden:"] * hidden + [f":{key}: {value}" for key, value in options.items()]
    return "\n".join(["```{toctree}", *lines, "", *names, "```"])


def listed(shown, page):
    """Pages by title and summary, and in the sidebar."""
    lines = [f"* [{p.title}]({relative(p.file, page)}){f': {p.summary[0].lower() + p.summary[1:] if p.summary[:2].istitle() else p.summary}' if p.summary else ''}" for p in shown]
    return "\n".join(lines) + "\n\n" + contents([f"/{p.name}" for p in shown])


def filled(markdown, page, pages, modules):
    """Comments of the form `<!-- pages: nbs -->` give way to what they name."""
    entry_of = {module.name.removeprefix("kdcode."): module.entries for module in modules}
    def within(folder): return [p for source, p in pages.items() if posixpath.dirname(source) == folder and p.name != "index"]
    def pages_of(what):
        if what == "kdcode": return listed([Page("api.md", f"api/{m.name.removeprefix('kdcode.')}", f"`{m.name}`", m.text) for m in modules], page.file)
        if what.startswith("nbs"): return listed(within(what), page.file)
        return listed([p for name in what.split() for p in pages.values() if fnmatch(p.name, name)], page.file)
    def report(name): return linked("\n".join((ROOT/"results"/name/"report.md").read_text().split("\n")[1:]), f"results/{name}/report.md", page.file, pages)
    def reports(_): return "\n".join(f"* [{path.parent.relative_to(ROOT/'results')}]({GITHUB}/blob/{BRANCH}/{path.relative_to(ROOT)})" for path in sorted((ROOT/"results").rglob("report.md")))
    def limits(_): return "\n".join(f"* [{p.title}]({relative(p.file, page.file)}#limits-and-sources)" for source, p in pages.items() if source.startswith("nbs/") and "## Limits and sources" in (ROOT/source).read_text())
    def names(_): return "\n".join(line(f"{kdcode.__name__}.{module}", entry_of[module][name]) for name in kdcode.__all__ if (module := kdcode._MODULES[name]) in entry_of)
    makers = {"names": names, "pages": pages_of, "report": report, "reports": reports, "limits": limits}
    return re.sub(r"<!-- (\w+)(?:: (.*?))? -->", lambda m: makers[m[1]](m[2]), markdown)


def markdown_page(page, pages, modules):
    """A Markdown file of the repository as a page, with its summary as the notebooks have theirs."""
    text = re.sub(r"\A---\n.*?\n---\n", "", (ROOT/page.source).read_text(), flags=re.S)
    text = re.sub(r"\A(\s*# .+\n\n)> (.+)\n", r"\1{.summary}\n\2\n", text)
    write(page.file, filled(linked(text, page.source, page.file, pages), page, pages, modules).encode())


# The API

def escaped(text):
    """A docstring is plain text, with code between backticks."""
    return without_code(lambda part: re.sub(r"([\\_<>$|\[\]#{}~])", r"\\\1", part), text)


def cell_of(text): return escaped(text).replace("\n", " ").replace("\\|", "|").replace("|", "\\|")


def code_in_cell(text): return f"`{text}`".replace("|", "\\|") if text else ""


def table(entry):
    """Parameters by name, type and default, with what is said of them."""
    gives = entry.returns if entry.returns and entry.returns.type != "None" else None
    rows = [row for row in entry.parameters if row.name != "*"]
    if not rows: return f"**Returns** `{gives.type}`{': ' * bool(gives.details)}{escaped(gives.details)}" if gives else ""
    if gives: rows = [*rows, Parameter("**returns**", gives.type, "", gives.details)]
    name = lambda row: row.name if row.name == "**returns**" else code_in_cell(row.name)
    lines = [f"| {name(row)} | {code_in_cell(row.type)} | {code_in_cell(row.default)} | {cell_of(row.details)} |" for row in rows]
    return "\n".join(["| parameter | type | default | meaning |", "|---|---|---|---|", *lines])


def block(entry, module, outer=""):
    """A function, a class or a method, as Sphinx's domain of Python has it."""
    kind = "method" if entry.kind == "property" else entry.kind
    brackets = "" if entry.kind == "property" else f"({entry.signature})"
    name = f"{outer}.{entry.name}" if outer else entry.name
    options = [":property:"] if entry.kind == "property" else []
    if entry.kind == "property": kind, options = "property", []
    source = f"{GITHUB}/blob/{BRANCH}/kdcode/{module}.py#L{entry.line}"
    where = f"{{.where}}\n[explained](#{label(module, entry.name)}) · [source]({source})" if not outer else ""
    parts = [escaped(entry.text), table(entry), where, *(block(method, module, entry.name) for method in entry.methods)]
    fence = ":::" if outer else "::::"
    return "\n".join([f"{fence}{{py:{kind}}} {name}{brackets}", *options, "", "\n\n".join(filter(None, parts)), fence])


def line(module, entry):
    """A name that leads to its entry, with what it is for."""
    return f"* {{py:obj}}`{entry.name} <{module}.{entry.name}>`: {escaped(entry.summary)}"


def api_page(module, page):
    """A page of one module: its names with their summaries first, then each of them."""
    short = module.name.removeprefix("kdcode.")
    names = "\n".join(line(module.name, entry) for entry in module.entries.values())
    rest = f"\nWithout an entry of their own: {', '.join(f'`{name}`' for name in module.constants)}.\n" if module.constants else ""
    blocks = "\n\n".join(block(entry, short) for entry in module.entries.values())
    write(f"api/{short}.md", f"""# `{module.name}`

{{.summary}}
{escaped(module.text)}

{{.page-links}}
[{page.title}, where it is built]({relative(page.file, "api/x")})

```{{py:module}} {module.name}
```

{names}
{rest}
## Reference

{blocks}
""".encode())


# All of it

def write(file, content):
    """Only what has changed, so that Sphinx reads only that."""
    path = SITE/file
    WRITTEN.add(path)
    if path.exists() and path.read_bytes() == content: return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def known_names():
    """What nbdev's addresses of names stand for, where the API has an entry."""
    from kdcode._modidx import d
    return {address: name for names in d["syms"].values() for name, (address, _) in names.items()}


INDEX = {"Start": ["install", "demo", "onyxia"], "Learn": ["lessons", "how"], "Look up": ["answers", "api", "glossary"]}


def build():
    pages = find_pages()
    builders = {page.name: page for source, page in pages.items() if re.fullmatch(r"nbs/\d\w*\.ipynb", source)}
    modules = [read_module(ROOT/"kdcode"/f"{name}.py") for name in builders if (ROOT/"kdcode"/f"{name}.py").exists()]
    documented = {f"{m.name}.{e.name}{suffix}" for m in modules for e in m.entries.values() for suffix in ["", *(f".{method.name}" for method in e.methods)]}
    NAMES.update({address: name for address, name in known_names().items() if name in documented})
    for module in modules: api_page(module, builders[module.name.removeprefix("kdcode.")])
    for source, page in pages.items():
        if source.endswith(".ipynb"): notebook_page(page, pages)
        else: markdown_page(page, pages, modules)
    for path in SITE.rglob("*"):
        if path.is_file() and path not in WRITTEN: path.unlink()


if __name__ == "__main__":
    os.chdir(ROOT)
    proc_nbs(n_workers=2)  # nbdev_proc_nbs without its offer to install Quarto
    build()
