"""The table of scikit-learn's estimators in docs/publishing.md."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version
from sklearn.utils import all_estimators

from splitserve.publishing.estimators.refused import AS_TRANSFORM, LIMITS, REFUSED

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_ADDED = re.compile(r"\.\. versionadded:: ([\d.]+)")


def table() -> Iterator[str]:
    """A line for each class that predicts or transforms."""
    lowest = lowest_version()
    yield "| estimator | last step | transform | limits, or why not |"
    yield "|---|---|---|---|"
    for name, kind in all_estimators():
        predicts, transforms = hasattr(kind, "predict") or name == "LocalOutlierFactor", hasattr(kind, "transform")
        if not (predicts or transforms or name in REFUSED):
            continue
        last = "refused" if name in REFUSED and not transforms else "yes" if predicts else ""
        step = "refused" if transforms and (name in REFUSED or name in AS_TRANSFORM) else "yes" if transforms else ""
        of_step = f"as a transform: {AS_TRANSFORM[name]}" if name in AS_TRANSFORM else ""
        said = of_step or REFUSED.get(name) or LIMITS.get(name, "")
        added = added_in(kind)
        since = f"since scikit-learn {added}" if added and added > lowest else ""
        yield f"| {name} | {last} | {step} | {'; '.join(filter(None, (since, said)))} |"


def lowest_version() -> Version:
    """The lowest version of scikit-learn that the extra publish accepts."""
    extra = tomllib.loads(_PROJECT.read_text())["project"]["optional-dependencies"]["publish"]
    [wanted] = (found for each in extra if (found := Requirement(each)).name == "scikit-learn")
    [lowest] = (each.version for each in wanted.specifier if each.operator == ">=")
    return Version(lowest)


def added_in(kind: type) -> Version | None:
    """The version of scikit-learn that added a class, as its docstring says; None where it says nothing: before 0.20 or so."""
    found = _ADDED.search((kind.__doc__ or "").partition("Parameters\n")[0])
    return Version(found[1]) if found else None
