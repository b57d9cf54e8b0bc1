"""What is installed: Python, the packages against what was tested, their byte-code, and our own code's digest."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from geneformer_ray.data.digests import code_digest
from geneformer_ray.finding import Finding, fault, note, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["check_byte_code", "check_packages", "check_python", "installed_here"]

DISTRIBUTION = "geneformer-ray"
PACKAGE = Path(__file__).parents[1]
CHECKOUT = PACKAGE.parent
# What every Ray worker of ours imports, and most of what is compiled at its start.
COMPILED = ("ray", "torch", "transformers", "mlflow")
# As the Makefile's NOT_COMPILED: what nothing here imports.
NOT_COMPILED = re.compile(r"/tests?/|/ray/rllib/|/transformers/models/(?!auto/|bert/)[^/]+/")
SAMPLE = 200  # modules of a package, evenly over all of them


def check_python(takes: str | None = None) -> Iterator[Finding]:
    """Compare this Python with what the package takes."""
    here = ".".join(map(str, sys.version_info[:3]))
    if takes is None:
        said = _requires()
        if said is None:
            found = f"{here}; {DISTRIBUTION} is not installed, nor is this a checkout: nothing says what it takes"
            yield warning("versions.python", found, "pip install . in a checkout, or make setup")
            return
        takes = said[0]
    if SpecifierSet(takes).contains(here):
        yield ok("versions.python", f"{here} at {sys.executable}")
    else:
        yield fault("versions.python", f"{here}, and {takes} is needed", "make clean setup PYTHON=python3.11")


def check_packages(
    lock: Path | None = None, *, requirements: Sequence[str] | None = None, paths: Sequence[str] | None = None
) -> Iterator[Finding]:
    """Compare what is installed with what the package needs and with the versions that are tested.

    Parameters
    ----------
    lock
        ``requirements.lock``; by default the one beside the package, where there is one.
    requirements
        What is needed; by default what the package says.
    paths
        Where packages are installed; by default where this Python looks.
    """
    found = _versions(paths)
    if requirements is None:
        said = _requires()
        if said is None:
            return  # the check of Python tells it
        requirements = said[1]
    broken = [text for text, is_met in _needed(requirements, found, paths) if not is_met]
    lock = CHECKOUT / "requirements.lock" if lock is None else lock
    install = f"make setup, or pip install -r {lock}" if lock.exists() else f"pip install --upgrade {DISTRIBUTION}"
    if broken:
        yield fault("versions.packages", f"{len(broken)} not met: {_some(broken)}", install)
    if not lock.exists():
        if not broken:
            yield ok("versions.packages", f"{len(found)} packages, all that is needed among them; no lock file")
        return
    pinned = _read_lock(lock)
    other = [f"{name} {found[name]} (tested: {version})" for name, version in pinned.items()
             if name in found and Version(found[name]).public != version]  # fmt: skip
    missing = sorted(pinned.keys() - found.keys())
    if other:
        yield warning("versions.lock", f"{len(other)} of {len(pinned)} are not as tested: {_some(other)}", install)
    elif not broken:
        less = f"; {len(missing)} that only tests or the demo need are not installed" if missing else ""
        yield ok("versions.packages", f"{len(pinned) - len(missing)} packages as pinned in {lock.name}{less}")


def installed_here() -> dict[str, str]:
    """Give what must be the same on every node: Python, each package's version, and a digest of our own code."""
    files = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
    python = ".".join(map(str, sys.version_info[:3]))
    return _versions(None) | {"python": python, "the code of geneformer_ray": code_digest(*files)}


def check_byte_code(
    packages: Sequence[str] = COMPILED, environment: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Look whether a sample of modules is compiled: else every Ray worker compiles its imports again."""
    missing: dict[str, int] = {}
    looked = 0
    folders: list[str] = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue  # not installed: the packages' own check says so
        folders += spec.submodule_search_locations
        modules = [path for folder in spec.submodule_search_locations for path in sorted(Path(folder).rglob("*.py"))
                   if not NOT_COMPILED.search(path.as_posix())]  # fmt: skip
        sample = modules[:: max(1, len(modules) // SAMPLE)]
        looked += len(sample)
        missing[package] = sum(not _is_compiled(path) for path in sample)
    off = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    lacking = [f"{package} {number}" for package, number in missing.items() if number]
    # A handful that no compiler takes (templates, code for other Pythons) costs nothing.
    if sum(missing.values()) > looked / 20:
        unset = "unset PYTHONDONTWRITEBYTECODE; " if off else ""
        roots = " ".join(sorted({str(Path(folder).parent) for folder in folders}))
        yield warning(
            "byte-code.compiled",
            f"of {looked} modules these are not compiled: {', '.join(lacking)}; workers start 3 times slower",
            f"{unset}make setup, or {sys.executable} -m compileall -q -j 0 {roots}",
        )
    else:
        yield ok("byte-code.compiled", f"{looked} modules of {', '.join(missing)} looked at")
    if off:
        yield note(
            "byte-code.written", "PYTHONDONTWRITEBYTECODE is set: what is installed or changed later stays slow",
            "unset PYTHONDONTWRITEBYTECODE",
        )  # fmt: skip


def _is_compiled(module: Path) -> bool:
    """Whether Python would take the compiled file: it is there, of this Python, and of this very source."""
    try:
        with open(importlib.util.cache_from_source(str(module)), "rb") as file:
            header = file.read(16)
    except OSError:
        return False
    if header[:4] != importlib.util.MAGIC_NUMBER or len(header) < 16:
        return False
    if int.from_bytes(header[4:8], "little"):
        return True  # made for a hash of the source, which is not compared with its time
    source = module.stat()
    stamp = (int(source.st_mtime) & 0xFFFFFFFF, source.st_size & 0xFFFFFFFF)
    return (int.from_bytes(header[8:12], "little"), int.from_bytes(header[12:16], "little")) == stamp


def _versions(paths: Sequence[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in metadata.distributions() if paths is None else metadata.distributions(path=list(paths)):
        # A broken leftover has no name. What stands first on the path is what is imported.
        if name := one.metadata["Name"]:
            found.setdefault(canonicalize_name(name), one.version)
    return found


def _needed(
    requirements: Iterable[str], found: Mapping[str, str], paths: Sequence[str] | None
) -> Iterator[tuple[str, bool]]:
    """Give all that is needed, by the package and by what it needs, and whether it is there in a fitting version."""
    queue = [(DISTRIBUTION, Requirement(text)) for text in requirements]
    known: dict[str, set[str]] = {}
    while queue:
        asker, wanted = queue.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}) and asker == DISTRIBUTION:
            continue  # for tests, the demo or benchmarks alone
        name = canonicalize_name(wanted.name)
        version = found.get(name)
        met = version is not None and wanted.specifier.contains(version, prereleases=True)
        yield f"{wanted.name}{wanted.specifier} for {asker} (here: {version or 'none'})", met
        extras = {"", *wanted.extras} - known.setdefault(name, set())
        if version is None or not extras:
            continue
        known[name] |= extras
        for text in _distribution(name, paths).requires or ():
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append((name, further))


def _distribution(name: str, paths: Sequence[str] | None) -> metadata.Distribution:
    if paths is None:
        return metadata.distribution(name)
    return next(iter(metadata.distributions(name=name, path=list(paths))))


def _requires() -> tuple[str, list[str]] | None:
    """Give the Python and the packages that are needed, as the installed package or its checkout says; else None."""
    try:
        return metadata.metadata(DISTRIBUTION)["Requires-Python"], metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        file = CHECKOUT / "pyproject.toml"
    if not file.exists():
        return None
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    return project["requires-python"], project["dependencies"]


def _read_lock(lock: Path) -> dict[str, str]:
    lines = lock.read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version.strip() for name, _, version in pairs}


def _some(texts: Sequence[str], most: int = 4) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
