"""Write the pages that Sphinx reads: processed notebooks, the Markdown of this folder, an API page per module.

`nbdev_proc_nbs` writes `_proc/`; this script writes `_proc/_site/` from it. Links are written as they work in the
repository (`../results/steps/report.md`); here they become links to pages of the site, or to GitHub. A broken link is
an error.
"""
import ast
import json
import os
import posixpath
import re
import sys
from collections import Counter
from configparser import ConfigParser
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import nbformat
import yaml
from nbdev.serve import proc_nbs
from nbformat.v4 import new_markdown_cell as markdown_cell

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT/"onyxia"), str(ROOT/"docs"), str(ROOT)]
import kdcode
from launch import launch_link
from library import Parameter, read_module

PROCESSED, SITE = ROOT/"_proc", ROOT/"_proc"/"_site"
parser = ConfigParser()
parser.read(ROOT/"settings.ini")
SETTINGS = parser["DEFAULT"]
GITHUB, BRANCH = SETTINGS["git_url"], SETTINGS["branch"]
HOST = SETTINGS["doc_host"] + SETTINGS["doc_baseurl"]
WRITTEN = set()  # files of the site


@dataclass
class Page:
    source: str  # path in the repository
    name: str    # path on the site, without a suffix
    title: str
    summary: str

    @property
    def file(self): return self.name + Path(self.source).suffix


# Pages

def title_of(path):
    """Return title and summary of a notebook or Markdown file: its first heading and the quote below it."""
    text = path.read_text()
    if path.suffix == ".ipynb": text = "".join(json.loads(text)["cells"][0]["source"])
    title = re.search(r"^# (.+)$", text, re.M)
    if not title: raise SystemExit(f"{path.relative_to(ROOT)} has no title; start it with a line such as: # Title")
    summary = re.match(r"\s*^> (.+)$", text[title.end():], re.M)
    return title[1], summary[1] if summary else ""


def name_of(source):
    """Return the name that nbdev gives a notebook's page: the file name without its number."""
    folder, file = posixpath.split(source.removeprefix("nbs/"))
    return posixpath.join(folder, re.sub(r"^\d+[a-z]*_", "", Path(file).stem))


def find_pages():
    """Return every page, by the path of its source in the repository."""
    notebooks = [path.relative_to(ROOT) for path in sorted((ROOT/"nbs").rglob("*.ipynb"))]
    shown = [path for path in notebooks if not any(part.startswith((".", "_")) for part in path.parts)]
    names = {ROOT/path: name_of(path.as_posix()) for path in shown}
    names |= {path: path.stem for path in sorted((ROOT/"docs").glob("*.md"))}
    names |= {path: f"models/{path.parent.name}" for path in sorted((ROOT/"models").glob("*/README.md"))}
    names |= {ROOT/file: Path(file).stem.lower() for file in ("CONTRIBUTING.md", "CHANGELOG.md")}
    sources = {path: path.relative_to(ROOT).as_posix() for path in names}
    counts = Counter(names.values())
    if same := [sources[path] for path, name in names.items() if counts[name] > 1]:
        raise SystemExit(f"these files would be the same page: {', '.join(same)}; rename one")
    return {sources[path]: Page(sources[path], name, *title_of(path)) for path, name in names.items()}


# Links

def resolve(link, source):
    """Return the repository path of a link. Links of the index may start at the root, as in the README."""
    for start in [posixpath.dirname(source)] + ([""] if source == "nbs/index.ipynb" else []):
        path = posixpath.normpath(posixpath.join(start, link))
        if (ROOT/path).exists() and not path.startswith(".."): return "nbs/index.ipynb" if path == "README.md" else path
    raise SystemExit(f"{source} links to {link}, which does not exist")


def address(link, source, page, pages, image=False):
    """Return a link of the repository as it works on the site."""
    if re.match(r"[a-z]+:|#", link): return link
    path, _, anchor = link.partition("#")
    path, anchor = resolve(path, source), anchor and f"#{anchor.lower()}"
    if image: return relative(copied(path), page)
    if path in pages: return relative(pages[path].file, page) + anchor
    return f"{GITHUB}/{'tree' if (ROOT/path).is_dir() else 'blob'}/{BRANCH}/{path}{anchor}"


def relative(file, page): return posixpath.relpath(file, posixpath.dirname(page) or ".")


def copied(path):
    """Copy a file of the repository to the site."""
    write(path, (ROOT/path).read_bytes())
    return path


def without_code(change, markdown):
    """Apply a change to everything outside code blocks and inline code."""
    parts = re.split(r"(^```.*?^```[^\S\n]*$|`+[^`\n]+`+)", markdown, flags=re.M | re.S)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def linked(markdown, source, page, pages, roles=True):
    """Return Markdown with its links and images as they work on the site.

    nbdev's links to names become references to the API, or plain code if `roles` is false.
    """
    def name(m): return reference(m[1], m[2]) if roles else f"`{m[1]}`"
    def link(m): return f"{m[1]}{m[2]}({address(m[3], source, page, pages, image=bool(m[1]))})"
    def change(text): return re.sub(r"(!?)(\[[^\[\]]*\]|\])\(([^()\s]+)\)", link, text)
    markdown = re.sub(rf"\[`([^`]+)`\]\({re.escape(HOST)}/(\S+?)\)", name, markdown)
    # link texts may contain inline code, so only code blocks are skipped
    parts = re.split(r"(^```.*?^```[^\S\n]*$)", markdown, flags=re.M | re.S)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


NAMES = {}  # nbdev's address to name: loss.html#log_probs to kdcode.loss.log_probs


def reference(text, target):
    """Return a reference to the API, or plain code for a name without an entry or a plain word such as `generate`."""
    ours = target in NAMES and re.search(r"[A-Z_.]", text)
    return f"{{py:obj}}`{text} <{NAMES[target]}>`" if ours else f"`{text}`"


# Notebooks

def notebook_page(page, pages):
    """Write a notebook as a page: title, links, cells, and an anchor where each name is defined."""
    processed = PROCESSED/Path(page.source).relative_to("nbs")
    notebook = nbformat.read(processed, as_version=4)
    cells = []
    for cell in notebook.cells[1:]:  # the first one is nbdev's title
        cell.metadata.pop("language", None)
        if shown := re.search(r"^show_doc\((\S+)\)$", cell.source, re.M): define(cells, page.name, shown[1])
        elif keep(cell): cells.append(presented(cell, page, pages))
    front = yaml.safe_load("".join(notebook.cells[0].source).strip().strip("-"))
    notebook.cells = [markdown_cell(heading(front["title"], front.get("description", ""), page)), *cells]
    sidebar = "\n\n".join(contents(names, caption=caption) for caption, names in INDEX.items())
    if page.name == "index": notebook.cells.append(markdown_cell(sidebar))
    for number, cell in enumerate(notebook.cells): cell.id = f"cell-{number}"  # the same in every build
    write(page.file, nbformat.writes(notebook).encode())


def keep(cell): return cell.source.strip() and not cell.source.startswith("<!--")


def only_imports(code):
    """Whether the code imports names and does nothing else."""
    body = ast.parse(code).body
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def presented(cell, page, pages):
    """Return a cell without directives, with its links rewritten."""
    links = (page.source, page.file, pages)
    if cell.cell_type == "markdown": cell.source = linked(cell.source, *links)
    if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    if cell.cell_type == "code" and page.name == "index": cell.metadata["tags"] = ["remove-input"]  # as in the README
    elif cell.cell_type == "code" and only_imports(cell.source): cell.metadata["tags"] = ["hide-input"]  # collapsed
    for data in (output.get("data", {}) for output in cell.get("outputs", [])):
        if text := data.get("text/markdown"): data["text/markdown"] = linked("".join(text), *links, roles=False)
    return cell


def define(cells, module, name):
    """Add anchors above the code that defines a name, and links to its API entry below."""
    entry = f"{{py:obj}}`{name} <kdcode.{module}.{name}>`"
    new = anchor(name) not in "".join(cell.source for cell in cells)
    target = f"({label(module, name)})=\n" + anchor(name) * new
    if cells[-1].metadata.get("defines"):
        cells[-1].source = cells[-1].source.replace("API: ", f"API: {entry} · ")  # nbdev lists them in reverse
        cells[-3].source += f"\n{target}"
        return
    links = markdown_cell(f"{{.defines}}\nAPI: {entry}", metadata={"defines": True})
    cells[-1:] = [markdown_cell(target), cells[-1], links]


def label(module, name):
    """Return the label of a definition. Labels are lower case, and a class and a function may differ only in case."""
    return f"{module}.{'class' if name[0].isupper() else 'name'}.{name.lower()}"


def anchor(name):
    """Return the anchor that nbdev's links lead to."""
    return f'<span id="{name.lower()}"></span>\n'


def heading(title, summary, page):
    """Return title, summary and links to open the notebook."""
    opened = [f"[Open in JupyterLab on Onyxia]({launch_link('jupyter-pytorch', page.source)})",
              f"[with a GPU]({launch_link('jupyter-pytorch-gpu', page.source)})",
              f"[Notebook]({GITHUB}/blob/{BRANCH}/{page.source})", f"[Glossary]({relative('glossary.md', page.file)})"]
    return f"# {title}\n\n{{.summary}}\n{summary}\n\n{{.page-links}}\n{' · '.join(opened)}\n"


# Markdown

def contents(names, hidden=True, **options):
    """Return a table of contents for the sidebar."""
    lines = [":hidden:"] * hidden + [f":{key}: {value}" for key, value in options.items()]
    return "\n".join(["```{toctree}", *lines, "", *names, "```"])


def listed(shown, page):
    """Return a list of pages with their summaries, which also go to the sidebar."""
    lines = [f"* [{p.title}]({relative(p.file, page)}){after_colon(p.summary)}" for p in shown]
    return "\n".join(lines) + "\n\n" + contents([f"/{p.name}" for p in shown])


def after_colon(summary):
    """Return a summary as the rest of a line, in lower case unless it starts with an acronym."""
    if not summary: return ""
    return ": " + (summary[0].lower() + summary[1:] if summary[:2].istitle() else summary)


def filled(markdown, page, pages, modules):
    """Replace comments of the form `<!-- pages: nbs -->` by the lists that they name."""
    makers = {"names": names_list, "pages": pages_list, "report": report_text, "reports": reports_list,
              "limits": limits_list}
    return re.sub(r"<!-- (\w+)(?:: (.*?))? -->", lambda m: makers[m[1]](m[2], page, pages, modules), markdown)


def pages_list(what, page, pages, modules):
    if what == "kdcode":
        api = [Page("api.md", f"api/{m.name.removeprefix('kdcode.')}", f"`{m.name}`", m.text) for m in modules]
        return listed(api, page.file)
    inside = [p for source, p in pages.items() if posixpath.dirname(source) == what and p.name != "index"]
    if what.startswith("nbs"): return listed(inside, page.file)
    return listed([p for name in what.split() for p in pages.values() if fnmatch(p.name, name)], page.file)


def report_text(name, page, pages, modules):
    text = (ROOT/"results"/name/"report.md").read_text().partition("\n")[2]
    return linked(text, f"results/{name}/report.md", page.file, pages)


def reports_list(_, page, pages, modules):
    paths = [path.relative_to(ROOT) for path in sorted((ROOT/"results").rglob("report.md"))]
    return "\n".join(f"* [{path.parent.relative_to('results')}]({GITHUB}/blob/{BRANCH}/{path})" for path in paths)


def limits_list(_, page, pages, modules):
    notebooks = [p for source, p in pages.items() if source.startswith("nbs/")]
    limited = [p for p in notebooks if "## Limits and sources" in (ROOT/p.source).read_text()]
    return "\n".join(f"* [{p.title}]({relative(p.file, page.file)}#limits-and-sources)" for p in limited)


def names_list(_, page, pages, modules):
    entries = {module.name.removeprefix("kdcode."): module.entries for module in modules}
    found = [(kdcode._MODULES[name], name) for name in kdcode.__all__ if kdcode._MODULES[name] in entries]
    return "\n".join(line(f"kdcode.{module}", entries[module][name]) for module, name in found)


def markdown_page(page, pages, modules):
    """Write a Markdown file of the repository as a page."""
    text = re.sub(r"\A---\n.*?\n---\n", "", (ROOT/page.source).read_text(), flags=re.S)
    text = re.sub(r"\A(\s*# .+\n\n)> (.+)\n", r"\1{.summary}\n\2\n", text)
    write(page.file, filled(linked(text, page.source, page.file, pages), page, pages, modules).encode())


# The API

def escaped(text):
    """Return a docstring as Markdown: plain text with inline code."""
    return without_code(lambda part: re.sub(r"([\\_<>$|\[\]#{}~])", r"\\\1", part), text)


def cell_of(text): return escaped(text).replace("\n", " ").replace("\\|", "|").replace("|", "\\|")


def code_in_cell(text): return f"`{text}`".replace("|", "\\|") if text else ""


def table(entry):
    """Return the parameters and the result as a table."""
    gives = entry.returns if entry.returns and entry.returns.type != "None" else None
    rows = [row for row in entry.parameters if row.name != "*"]
    if not rows and not gives: return ""
    if not rows: return f"**Returns** `{gives.type}`{': ' * bool(gives.details)}{escaped(gives.details)}"
    if gives: rows = [*rows, Parameter("**returns**", gives.type, "", gives.details)]
    return "\n".join(["| parameter | type | default | description |", "|---|---|---|---|", *map(table_row, rows)])


def table_row(row):
    name = row.name if row.name == "**returns**" else code_in_cell(row.name)
    return f"| {name} | {code_in_cell(row.type)} | {code_in_cell(row.default)} | {cell_of(row.details)} |"


def block(entry, module, outer=""):
    """Return a function, class or method as a directive of Sphinx's Python domain."""
    signature = "" if entry.kind == "property" else f"({entry.signature})"
    name = f"{outer}.{entry.name}" if outer else entry.name
    source = f"{GITHUB}/blob/{BRANCH}/kdcode/{module}.py#L{entry.line}"
    where = f"{{.where}}\n[notebook](#{label(module, entry.name)}) · [source]({source})" if not outer else ""
    parts = [escaped(entry.text), table(entry), where, *(block(method, module, entry.name) for method in entry.methods)]
    fence = ":::" if outer else "::::"
    return "\n".join([f"{fence}{{py:{entry.kind}}} {name}{signature}", "", "\n\n".join(filter(None, parts)), fence])


def line(module, entry):
    """Return a link to an entry, with its summary."""
    return f"* {{py:obj}}`{entry.name} <{module}.{entry.name}>`: {escaped(entry.summary)}"


def api_page(module, page):
    """Write the API page of one module: a list of its names, then their entries."""
    short = module.name.removeprefix("kdcode.")
    names = "\n".join(line(module.name, entry) for entry in module.entries.values())
    constants = ", ".join(f"`{name}`" for name in module.constants)
    more = f"\nConstants and type aliases: {constants}.\n" if constants else ""
    blocks = "\n\n".join(block(entry, short) for entry in module.entries.values())
    write(f"api/{short}.md", f"""# `{module.name}`

{{.summary}}
{escaped(module.text)}

{{.page-links}}
[Notebook: {page.title}]({relative(page.file, "api/x")})

```{{py:module}} {module.name}
```

{names}
{more}
## Reference

{blocks}
""".encode())


# Build

def write(file, content):
    """Write a file if its content changed, so that Sphinx reads only changed files."""
    path = SITE/file
    WRITTEN.add(path)
    if path.exists() and path.read_bytes() == content: return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def known_names():
    """Return the full name for each of nbdev's addresses."""
    from kdcode._modidx import d
    return {address: name for names in d["syms"].values() for name, (address, _) in names.items()}


INDEX = {  # the sidebar
    "Start": ["install", "demo", "server", "editors", "onyxia"],
    "Learn": ["lessons", "how"],
    "Reference": ["answers", "reference", "glossary"],
}


def build():
    pages = find_pages()
    builders = {page.name: page for source, page in pages.items() if re.fullmatch(r"nbs/\d\w*\.ipynb", source)}
    modules = [read_module(ROOT/"kdcode"/f"{name}.py") for name in builders if (ROOT/"kdcode"/f"{name}.py").exists()]
    entries = [(f"{module.name}.{entry.name}", entry) for module in modules for entry in module.entries.values()]
    documented = {name for name, _ in entries} | {f"{name}.{m.name}" for name, entry in entries for m in entry.methods}
    NAMES.update({address: name for address, name in known_names().items() if name in documented})
    for module in modules: api_page(module, builders[module.name.removeprefix("kdcode.")])
    for source, page in pages.items():
        if source.endswith(".ipynb"): notebook_page(page, pages)
        else: markdown_page(page, pages, modules)
    for path in SITE.rglob("*"):
        if path.is_file() and path not in WRITTEN: path.unlink()


if __name__ == "__main__":
    os.chdir(ROOT)
    proc_nbs(n_workers=2)  # nbdev_proc_nbs, without its offer to install Quarto
    build()
