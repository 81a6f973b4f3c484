"""Links that start JupyterLab on Onyxia with this project in it. `python onyxia/launch.py [NOTEBOOK]` prints them as Markdown."""
import sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = "https://datalab.sspcloud.fr/launcher/ide"
IMAGES = {"jupyter-pytorch-gpu": "a GPU", "jupyter-pytorch": "CPUs alone"}  # of the catalogue, with what each computes on

def repository() -> tuple[str, str]:
    """Address of the repository, and of the init script as plain text (Onyxia follows no redirect), from settings.ini."""
    parser = ConfigParser()
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    url, branch = parser["DEFAULT"]["git_url"].removesuffix("/"), parser["DEFAULT"]["branch"]
    raw = url.replace("https://github.com/", "https://raw.githubusercontent.com/") if "://github.com/" in url else f"{url}/-/raw"
    return url, f"{raw}/{branch}/onyxia/init.sh"

def text(value: str) -> str:
    """A string as the launcher reads it: between « and », percent-encoded."""
    return quote(f"«{value}»", safe="")

def launch_link(
    image: str,                   # one of IMAGES
    notebook: str | None = None,  # that is opened, by its path in the repository; None: the first lesson
    port: bool = False,           # opens port 5000 to the internet, for kdcode serve
) -> str:
    """The address that starts a service of this image with the project. Raises `ValueError` for an unknown image or notebook."""
    if image not in IMAGES: raise ValueError(f"there is no image {image!r}; choose one of {', '.join(IMAGES)}")
    if notebook and not (ROOT/notebook).is_file(): raise ValueError(f"there is no notebook {notebook!r}; give its path in the repository, such as nbs/index.ipynb")
    if notebook and any(letter.isspace() for letter in notebook): raise ValueError(f"the notebook {notebook!r} has a space in its path, at which Onyxia would split it")
    url, script = repository()
    values = {"autoLaunch": "true", "name": "kdcode", "git.repository": text(url), "init.personalInit": text(script)}
    if notebook: values["init.personalInitArgs"] = text(notebook)
    if port: values["networking.user.enabled"] = "true"
    return f"{LAUNCHER}/{image}?" + "&".join(f"{key}={value}" for key, value in values.items())

def markdown(notebook: str | None = None) -> str:
    """The links for both images, as a list in Markdown."""
    return "\n".join(f"* [Open in JupyterLab on Onyxia, with {machine}]({launch_link(image, notebook)})" for image, machine in IMAGES.items())


if __name__ == "__main__":
    try: print(markdown(*sys.argv[1:2]))
    except ValueError as error: sys.exit(f"launch.py: {error}")
