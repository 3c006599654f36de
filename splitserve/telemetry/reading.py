"""What the scrapes of a service say: how it is now, and what happened between two of them. For commands that show it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from splitserve.telemetry.registry import Family

Over = Callable[[Iterable[float]], float]

_Series = tuple[tuple[str, str], ...]
"""Labels and their values, sorted."""


class NotMetrics(ValueError):
    """A text is not what `/metrics` of a service answers."""


class Scrape:
    """The values of one scrape.

    Args:
        text: in Prometheus' format.
        at: when it was made, on the monotonic clock.

    Raises:
        NotMetrics: it is not in that format.
    """

    def __init__(self, text: str, at: float) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self.at = at
        self.values: dict[str, dict[_Series, float]] = defaultdict(dict)
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    self.values[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
        except (ValueError, IndexError, KeyError, AttributeError) as error:  # as the parser fails
            raise NotMetrics(f"malformed: {error}") from None

    def select(self, name: str, labels: Mapping[str, str]) -> Iterator[tuple[_Series, dict[str, str], float]]:
        """The series of a name that have these labels."""
        for series, value in self.values.get(name, {}).items():
            found = dict(series)
            if all(found.get(label) == wanted for label, wanted in labels.items()):
                yield series, found, value

    def values_of(self, family: Family, label: str, **labels: str) -> list[str]:
        """The values of a label, each once, as they are listed."""
        return list(dict.fromkeys(found[label] for _, found, _ in self.select(_first_name(family), labels) if label in found))

    def values_by(self, family: Family, names: tuple[str, ...], over: Over = sum, **labels: str) -> dict[tuple[str, ...], float]:
        """A gauge now, by the values of some labels.

        Args:
            family: which.
            names: of the labels.
            over: what several workers come to: ``sum``, or ``max`` of what each says of the same.
            labels: that the series have.
        """
        found: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for _, values, value in self.select(family.name, labels):
            found[tuple(values.get(name, "") for name in names)].append(value)
        return {values: over(each) for values, each in found.items()}

    def value(self, family: Family, over: Over = sum, **labels: str) -> float | None:
        """As `values_by`, over all series with these labels; None: there is none."""
        return self.values_by(family, (), over, **labels).get(())

    @property
    def is_ours(self) -> bool:
        """Whether a service of splitserve has answered."""
        return any(name.startswith("splitserve_") for name in self.values)


class Interval:
    """Two scrapes of one listener.

    Args:
        before: None: there is no earlier one, so that nothing is known of what happened.
        after: the later one.
    """

    def __init__(self, before: Scrape | None, after: Scrape) -> None:
        self._before = before
        self.now = after

    @property
    def seconds(self) -> float:
        """Between the two; 0: there is one only."""
        return self.now.at - self._before.at if self._before else 0.0

    def per_s(self, family: Family, **labels: str) -> float | None:
        """The rate of a counter, over all series with these labels; None: unknown."""
        increases = list(self._increases(family.name, labels))
        return sum(n for _, n in increases) / self.seconds if self.seconds > 0 and increases else None

    def per_s_by(self, family: Family, names: tuple[str, ...], **labels: str) -> dict[tuple[str, ...], float]:
        """The rates of a counter by the values of some labels; nothing if they are unknown."""
        found: dict[tuple[str, ...], float] = defaultdict(float)
        if self.seconds > 0:
            for values, n in self._increases(family.name, labels):
                found[tuple(values.get(name, "") for name in names)] += n / self.seconds
        return dict(found)

    def mean(self, family: Family, **labels: str) -> float | None:
        """The mean of what a histogram has recorded; None: nothing."""
        n = sum(n for _, n in self._increases(f"{family.name}_count", labels))
        return sum(n for _, n in self._increases(f"{family.name}_sum", labels)) / n if n else None

    def quantile(self, family: Family, q: float, **labels: str) -> float | None:
        """A quantile of what a histogram has recorded, interpolated within its bucket; None: nothing was.

        Above the last bound it is that bound. Source: Prometheus, histogram_quantile.
        """
        counts: dict[float, float] = defaultdict(float)
        for values, n in self._increases(f"{family.name}_bucket", labels):
            counts[float(values["le"])] += n
        bounds = sorted(counts)
        rank = q * counts.get(math.inf, 0.0)
        if not rank:
            return None
        low, n_below = 0.0, 0.0
        for bound in bounds:
            if counts[bound] >= rank:
                if bound == math.inf:
                    return low
                return low + (bound - low) * (rank - n_below) / (counts[bound] - n_below)
            low, n_below = bound, counts[bound]
        return low

    def _increases(self, name: str, labels: Mapping[str, str]) -> Iterator[tuple[dict[str, str], float]]:
        """By how much counters have grown; one that has fallen began again at 0. Source: Prometheus, increase."""
        if self._before is None:
            return
        before = self._before.values.get(name, {})
        for series, values, value in self.now.select(name, labels):
            was = before.get(series, 0.0)
            yield values, value - was if value >= was else value


def _first_name(family: Family) -> str:
    return f"{family.name}_count" if family.kind == "histogram" else family.name
