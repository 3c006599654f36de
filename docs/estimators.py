"""The table of scikit-learn's estimators in docs/publishing.md."""

from __future__ import annotations

from collections.abc import Iterator

from sklearn.utils import all_estimators

from splitserve.publishing.estimators.refused import AS_TRANSFORM, LIMITS, REFUSED


def table() -> Iterator[str]:
    """A line for each class that predicts or transforms."""
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
        yield f"| {name} | {last} | {step} | {said} |"
