"""Links that start JupyterLab with this project on Onyxia.

`python onyxia/launch.py [NOTEBOOK]` prints them as Markdown.
"""
import sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = "https://datalab.sspcloud.fr/launcher/ide"
IMAGES = {"jupyter-pytorch-gpu": "with a GPU", "jupyter-pytorch": "CPU only"}  # services of the catalogue


def repository() -> tuple[str, str]:
    """Return the URLs of the repository and of its init script, from settings.ini.

    The script's URL serves plain text directly, because Onyxia follows no redirects.
    """
    parser = ConfigParser()
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    url, branch = parser["DEFAULT"]["git_url"].removesuffix("/"), parser["DEFAULT"]["branch"]
    raw = f"{url}/-/raw"  # GitLab
    if "://github.com/" in url: raw = url.replace("https://github.com/", "https://raw.githubusercontent.com/")
    return url, f"{raw}/{branch}/onyxia/init.sh"


def launcher_string(value: str) -> str:
    """Return a string in the launcher's syntax: between « and », percent-encoded."""
    return quote(f"«{value}»", safe="")


def check_notebook(notebook: str) -> None:
    """Raise `ValueError` if a notebook does not exist or its path contains a space."""
    if not (ROOT/notebook).is_file():
        raise ValueError(f"there is no notebook {notebook!r}; give its path in the repository, such as nbs/index.ipynb")
    if any(letter.isspace() for letter in notebook):
        raise ValueError(f"the path of notebook {notebook!r} contains a space, where Onyxia would split it; rename it")


def launch_link(
    image: str,                   # one of IMAGES
    notebook: str | None = None,  # notebook to open, as its path in the repository; None: the first lesson
    port: bool = False,           # whether to open port 5000 to the internet, for kdcode serve
    assistant: bool = False,      # whether to install the assistant
) -> str:
    """Return the URL that starts a service with this project. Raises `ValueError` for an unknown image or notebook."""
    if image not in IMAGES:
        raise ValueError(f"there is no image {image!r}; choose one of {', '.join(IMAGES)}")
    if notebook: check_notebook(notebook)
    url, script = repository()
    values = {"autoLaunch": "true", "name": "kdcode", "git.repository": launcher_string(url),
              "init.personalInit": launcher_string(script)}
    if words := ["--with-assistant"] * assistant + [notebook] * bool(notebook):
        values["init.personalInitArgs"] = launcher_string(" ".join(words))
    if port: values["networking.user.enabled"] = "true"
    return f"{LAUNCHER}/{image}?" + "&".join(f"{key}={value}" for key, value in values.items())


def markdown(notebook: str | None = None) -> str:
    """Return the links of all images as a list in Markdown."""
    return "\n".join(f"* [Open in JupyterLab on Onyxia, {machine}]({launch_link(image, notebook)})"
                     for image, machine in IMAGES.items())


if __name__ == "__main__":
    try: print(markdown(*sys.argv[1:2]))
    except ValueError as error: sys.exit(f"launch.py: {error}")
