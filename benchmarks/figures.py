"""What must hold on a machine with two cores, the load generator on it too: each figure with its bound and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from benchmarks.measuring import Case, Measurement, Protocol
from benchmarks.peer_systems import KSERVE, PLAIN, PYTRITON, SINGLE
from benchmarks.report import table

SPLIT, FUSED, SKLEARN, COMPILED = "split", "fused", "split, scikit-learn", "split, compiled"
"""Our systems: with default settings, in one process, and with either runtime of the transforms."""

Sense = Literal["at least", "at most", "under"]

_MEETS: Mapping[str, Callable[[float, float], bool]] = {
    "at least": lambda value, bound: value >= bound,
    "at most": lambda value, bound: value <= bound,
    "under": lambda value, bound: value < bound,
}


class Figure(msgspec.Struct, frozen=True):
    """One claim. ``measured`` None: what it needs was not measured."""

    name: str
    sense: Sense
    bound: float
    unit: str
    measured: float | None

    @property
    def is_met(self) -> bool | None:
        return None if self.measured is None else _MEETS[self.sense](self.measured, self.bound)


class Medians:
    """Medians of what was measured, to be asked for by case.

    Args:
        medians: of each case.
        open_loop: at half of the highest rate.
        tensor_mb_per_s: by model, the best of the protocols.
        pss_mb: of the three services together.
        cold_start_s: until all three are ready.
    """

    def __init__(
        self,
        medians: Sequence[Measurement],
        *,
        open_loop: Measurement | None,
        tensor_mb_per_s: Mapping[str, float],
        pss_mb: float | None,
        cold_start_s: float | None,
    ) -> None:
        self._medians = {each.case: each for each in medians}
        self.open_loop = open_loop
        self.tensor_mb_per_s = tensor_mb_per_s
        self.pss_mb = pss_mb
        self.cold_start_s = cold_start_s

    def of(self, system: str, model: str, protocol: Protocol, concurrency: int) -> Measurement | None:
        return self._medians.get(Case(system, model, protocol, concurrency))

    def rate(self, system: str, model: str = "breast-cancer", protocol: Protocol = "REST JSON") -> float | None:
        """Requests a second, 64 in flight."""
        found = self.of(system, model, protocol, 64)
        return None if found is None else found.load.per_s

    def p50_alone_ms(self, system: str) -> float | None:
        """Over REST, one request in flight."""
        found = self.of(system, "breast-cancer", "REST JSON", 1)
        return None if found is None else found.load.p50_ms


def figures(outcome: Medians) -> list[Figure]:
    """All that must hold."""
    rest, p50 = outcome.rate, outcome.p50_alone_ms
    main = outcome.of(SPLIT, "breast-cancer", "REST JSON", 64)
    kserve_grpc = rest(KSERVE, protocol="gRPC unary")
    open_p99 = None if outcome.open_loop is None else outcome.open_loop.load.p99_ms
    tensor = outcome.tensor_mb_per_s.get
    return [
        _times("REST, breast-cancer, 64 at once: requests/s against KServe's", 15, rest(SPLIT), rest(KSERVE)),
        _times("… against the plain split's", 12, rest(SPLIT), rest(PLAIN)),
        _times("… against the single process's", 3, rest(SPLIT), rest(SINGLE)),
        Figure("… CPU over all three services", "at most", 100, "µs/request", None if main is None else main.total_cpu_us),
        Figure("REST, 1 at once: p50 against KServe's", "at most", 0.75, "times", _ratio(p50(SPLIT), p50(KSERVE))),
        Figure("REST, 1 at once: p50", "at most", 1.6, "ms", p50(SPLIT)),
        _times("gRPC calls, 64 at once: requests/s against KServe's", 4, rest(SPLIT, protocol="gRPC unary"), kserve_grpc),
        _times("gRPC stream, 64 in flight, against KServe's calls", 10, rest(SPLIT, protocol="gRPC stream"), kserve_grpc),
        _times("penguins, scikit-learn, against the plain split's", 12, rest(SKLEARN, "penguins"), rest(PLAIN, "penguins")),
        _times("penguins, compiled, against the plain split's", 25, rest(COMPILED, "penguins"), rest(PLAIN, "penguins")),
        _times("split against fused, REST, 64 at once", 0.4, rest(SPLIT), rest(FUSED)),
        Figure("602 kB tensor through both hops, small answer", "at least", 250, "MB/s", tensor("tensor-mean")),
        Figure("602 kB tensor through both hops and back, one way counted", "at least", 250, "MB/s", tensor("tensor")),
        Figure("p99 at half of the highest rate against p50 of 1 at once", "under", 4, "times", _ratio(open_p99, p50(SPLIT))),
        Figure("memory of the three services after load (PSS)", "under", 330, "MB", outcome.pss_mb),
        Figure("cold start, all three ready with the demo models", "under", 4, "s", outcome.cold_start_s),
    ]


def remarks(outcome: Medians) -> dict[str, float | None]:
    """Ratios without a requirement."""
    return {"REST, breast-cancer, 64 at once: requests/s against PyTriton's": _ratio(outcome.rate(SPLIT), outcome.rate(PYTRITON))}


def figure_table(found: Sequence[Figure]) -> str:
    """``figure | required | measured | met``."""
    met = {True: "yes", False: "NO", None: "not measured"}
    rows = [[each.name, f"{each.sense} {each.bound:g} {each.unit}", _shown(each), met[each.is_met]] for each in found]
    return table(("figure", "required", "measured", "met"), rows)


def _shown(figure: Figure) -> str:
    return "" if figure.measured is None else f"{figure.measured:.3g}" if figure.measured < 100 else f"{figure.measured:.0f}"


def _times(name: str, bound: float, value: float | None, reference: float | None) -> Figure:
    return Figure(name, "at least", bound, "times", _ratio(value, reference))


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other
