"""Library versions: those that a bundle was published with, those of this process, and whether they are compatible.

The rules are in `RULES`, and as a table in docs/versions.md.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import msgspec

from splitserve.repository.manifest import Kind

VersionNumbers = tuple[int, ...]

_NUMBERS = re.compile(r"\d+(\.\d+)*")


class Rule(msgspec.Struct, frozen=True):
    """How close the version here must be to the one that a bundle was published with.

    ``fits`` compares (published with, here) as version numbers. If it does not fit, the bundle is refused (``is_required``) or
    loaded with a warning.
    """

    package: str
    fits: Callable[[VersionNumbers, VersionNumbers], bool]
    is_required: bool
    meaning: str


def _same_major(made: VersionNumbers, here: VersionNumbers) -> bool:
    return made[:1] == here[:1]


def _same_minor(made: VersionNumbers, here: VersionNumbers) -> bool:
    return made[:2] == here[:2]


def _not_older_minor(made: VersionNumbers, here: VersionNumbers) -> bool:
    return made[:2] <= here[:2]


RULES: dict[Kind, tuple[Rule, ...]] = {
    "preprocess": (
        Rule("scikit-learn", _same_minor, True, "the same minor version"),
        Rule("numpy", _same_major, True, "the same major version"),
        Rule("skops", _not_older_minor, True, "not an older minor version"),
        Rule("pandas", _same_major, False, "the same major version"),
        Rule("scipy", _same_major, False, "the same major version"),
        Rule("pillow", _same_major, False, "the same major version"),
        Rule("python", _same_minor, False, "the same minor version"),
    ),
    "predict": (),
}
"""Fitted scikit-learn objects are bound to the minor version that made them (scikit-learn, "Model persistence"). A predictor
needs the ONNX versions in its model file, which `runtimes.onnx_support` checks."""

PORTABLE_RULES: tuple[Rule, ...] = (Rule("numpy", _same_major, True, "the same major version"),)
"""Of a preprocessor that runs by its plan, which is data. What single operations need beside numpy is in ``plan.json``."""


class Mismatch(msgspec.Struct, frozen=True):
    """A package whose version here breaks a rule."""

    package: str
    made_with: str
    here: str
    is_required: bool
    meaning: str

    def __str__(self) -> str:
        need = "required" if self.is_required else "expected"
        here = self.here or "none"
        return f"published with {self.package} {self.made_with}, this service runs {here} ({need}: {self.meaning})"


_installed = cache(version)
"""A version does not change while a process runs, and finding it means reading and parsing the package's metadata."""


def observe(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of those of the packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = _installed(package)
        except PackageNotFoundError:
            continue
    return found


def mismatches(
    kind: Kind, made_with: Mapping[str, str], here: Mapping[str, str] | None = None, *, portable: bool = False
) -> list[Mismatch]:
    """The rules that this environment breaks for a bundle.

    Args:
        kind: of the bundle.
        made_with: the manifest's environment. Packages that it does not name are not compared, but scikit-learn must be named.
        here: versions by package; those of this process by default.
        portable: the bundle runs by its plan.
    """
    rules = PORTABLE_RULES if portable else RULES[kind]
    here = observe([rule.package for rule in rules]) if here is None else here
    found = []
    for rule in rules:
        made, have = made_with.get(rule.package, ""), here.get(rule.package, "")
        if not made and rule.package != "scikit-learn":
            continue
        if not made or not have or not rule.fits(_numbers(made), _numbers(have)):
            found.append(Mismatch(rule.package, made or "(unknown)", have, rule.is_required, rule.meaning))
    return found


def _numbers(text: str) -> VersionNumbers:
    """The numbers at the beginning of a version: ``"1.9.1rc2"`` -> (1, 9, 1)."""
    match = _NUMBERS.match(text)
    return tuple(int(number) for number in match[0].split(".")) if match else ()
