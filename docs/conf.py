"""Sphinx configuration. `make docs` builds the site; pages.py writes what is read here."""
import importlib.metadata
import importlib.util
import shutil
from pathlib import Path

DOCS = Path(__file__).parent

project = "kdcode"
author = "The kdcode authors"
copyright = f"2026 onwards, {author}"
release = importlib.metadata.version("kdcode")
language = "en"

extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax"]
root_doc = "index"
nitpicky = True  # a reference to a name without an entry is a warning, and warnings are errors
add_module_names = False

nb_execution_mode = "off"  # the committed outputs are shown
nb_render_markdown_format = "gfm"
nb_merge_streams = True
nb_code_prompt_show = "Imports"  # only cells of imports are collapsed
nb_code_prompt_hide = "Imports"
myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_block", "attrs_inline"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# Nothing is loaded from other servers: MathJax comes from a package, and its SVG output needs no fonts.
mathjax_path = "mathjax.js"
mathjax3_config = {"svg": {"scale": 0.92}}
html_static_path = ["static"]
html_css_files = ["kdcode.css"]
html_search_scorer = str(DOCS/"static"/"search.js")
html_favicon = "static/kdcode.svg"
html_context = {"default_mode": "auto"}  # light or dark, following the reader's system

html_theme = "sphinx_book_theme"
html_title = "kdcode"
html_baseurl = "https://kdcode.github.io/kdcode/"
html_show_sourcelink = False
html_copy_source = False
html_last_updated_fmt = None
html_theme_options = {
    "repository_url": "https://github.com/kdcode/kdcode",
    "use_repository_button": True,
    "use_download_button": False,
    "show_navbar_depth": 1,
    **{f"navbar_{part}": [] for part in ("start", "center", "end", "persistent")},  # the search is in the sidebar
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def copy_mathjax(app):
    """Copy MathJax to the static files before pages are written."""
    folder = Path(importlib.util.find_spec("mathjax").submodule_search_locations[0])
    target = Path(app.outdir)/"_static"/"mathjax.js"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder/"static"/"mathjax"/"es5"/"tex-svg.js", target)


def setup(app): app.connect("builder-inited", copy_mathjax)
