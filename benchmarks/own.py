"""``python -m benchmarks own``: our services alone: models, protocols, concurrency, rates, memory, cold start."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from benchmarks import answers, systems
from benchmarks.measuring import Case, Measurement, Protocol, check, measure, median
from benchmarks.models import imagenet, publish_demos, publish_tensors
from benchmarks.processes import BenchmarkError, RunningSystem, SystemSpec
from benchmarks.report import cpu, measurement_table, memory_table, table
from benchmarks.systems import Settings
from benchmarks.workloads import Workload
from training.demo import DEMOS

PROTOCOLS: tuple[Protocol, ...] = ("REST JSON", "REST binary", "gRPC unary", "gRPC stream")
MODELS = ("breast-cancer", "penguins", "tensor", "tensor-mean", "imagenet")
SWEPT = ("breast-cancer", "penguins")
"""Models that the open loop is run on."""

RATES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Rates of arrivals, as parts of the highest rate that the closed loop has reached."""

MOST_AT_ONCE = {"tensor": 64, "tensor-mean": 64, "imagenet": 16}
"""Models for which more would measure memory bandwidth, or take longer than the run."""


class OwnOptions(msgspec.Struct, frozen=True):
    """What to run. ``settings`` are the services'."""

    models: tuple[str, ...] = MODELS
    protocols: tuple[Protocol, ...] = PROTOCOLS
    concurrency: tuple[int, ...] = (1, 16, 64, 256)
    systems: tuple[str, ...] = ("split", "fused")
    seconds: float = 3.0
    rounds: int = 1
    rates: tuple[float, ...] = RATES
    n_cold_starts: int = 3
    settings: Settings = {}
    imagenet: Path = Path("models")


class OwnResults:
    """Results so far, and what was not measured."""

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []
        self.swept: list[Measurement] = []
        self.pss_mb: dict[str, dict[str, float]] = {}
        self.peak_mb: dict[str, dict[str, float]] = {}
        self.cold_start_s: dict[str, float] = {}
        self.skipped: list[str] = []

    def skip(self, what: str) -> None:
        self.skipped.append(what)
        print(f"not measured: {what}", flush=True)

    @property
    def n_failed(self) -> int:
        return sum(each.load.n_failed for each in (*self.measurements, *self.swept))

    def sections(self) -> dict[str, str]:
        """Markdown by heading."""
        found = {
            "Closed loop": measurement_table(self.measurements),
            "Open loop": measurement_table(self.swept),
            "Memory": memory_table(self.pss_mb, self.peak_mb),
            "Cold start": table(("system", "s until ready"), [[name, f"{s:.2f}"] for name, s in self.cold_start_s.items()]),
            "Not measured": "\n".join(f"- {each}" for each in self.skipped),
        }
        empty = {"Open loop": self.swept, "Memory": self.pss_mb, "Cold start": self.cold_start_s, "Not measured": self.skipped}
        return {heading: text for heading, text in found.items() if empty.get(heading, True)}

    def data(self) -> dict[str, object]:
        return {
            "closed_loop": self.measurements,
            "open_loop": self.swept,
            "pss_mb": self.pss_mb,
            "peak_rss_mb": self.peak_mb,
            "cold_start_s": self.cold_start_s,
            "not_measured": self.skipped,
        }


def run(options: OwnOptions, scratch: Path) -> OwnResults:
    """Run what the options name.

    Args:
        options: what to run.
        scratch: a folder for repositories and logs.

    Raises:
        BenchmarkError: a system does not start, or an answer is wrong.
    """
    found = OwnResults()
    demos = publish_demos(scratch / "demos")
    tensors = publish_tensors(scratch / "tensors")
    for which in options.systems:
        for plan, workloads in _plans(options, which, scratch, demos, tensors, found):
            _measure_system(plan, workloads, options, scratch, found)
        if options.n_cold_starts:
            found.cold_start_s[which] = cold_start_s(
                plan_of(which, scratch / "demos", options.settings), scratch, options.n_cold_starts
            )
    return found


def plan_of(which: str, repository: Path, settings: Settings) -> SystemSpec:
    """``split`` or ``fused``."""
    make = {"split": systems.split, "fused": systems.fused}[which]
    return make(repository, settings, name=which)


def _plans(
    options: OwnOptions, which: str, scratch: Path, demos: dict[str, Workload], tensors: dict[str, Workload], found: OwnResults
) -> Iterable[tuple[SystemSpec, list[Workload]]]:
    for folder, workloads in (("demos", demos), ("tensors", tensors)):
        if wanted := [workload for name, workload in workloads.items() if name in options.models]:
            yield plan_of(which, scratch / folder, options.settings), wanted
    if "imagenet" in options.models:
        if (options.imagenet / "imagenet").is_dir():
            yield plan_of(which, options.imagenet, {"MODELS": "imagenet", **options.settings}), [imagenet()]
        else:
            found.skip(f"{which}, imagenet: {options.imagenet / 'imagenet'} is not there; make imagenet publishes it")


def _measure_system(
    plan: SystemSpec, workloads: Sequence[Workload], options: OwnOptions, scratch: Path, found: OwnResults
) -> None:
    with RunningSystem(plan, scratch) as system:
        systems.wait_until_ready(system, [workload.model for workload in workloads])
        for workload in workloads:
            measured = _closed_loop(system, workload, options, found)
            found.measurements += measured
            if workload.model in SWEPT and options.rates:
                found.swept += _open_loop(system, workload, options, measured)
        key = (
            f"{plan.name}, {workloads[0].model if len(workloads) == 1 else 'and '.join(w.model + ' ' for w in workloads).strip()}"
        )
        found.pss_mb[key], found.peak_mb[key] = system.pss_mb(), system.peak_rss_mb()


def _closed_loop(system: RunningSystem, workload: Workload, options: OwnOptions, found: OwnResults) -> list[Measurement]:
    protocols = [each for each in options.protocols if each != "REST JSON" or workload.has_json]
    answer_bytes = check(system, workload, protocols)
    if "gRPC stream" in protocols and not answers.offers_stream(system.grpc, workload):
        found.skip(f"{system.name}, {workload.model}, gRPC stream: the server has none")
        protocols.remove("gRPC stream")
    measured = []
    for protocol in protocols:
        for concurrency in options.concurrency:
            if concurrency > MOST_AT_ONCE.get(workload.model, concurrency):
                continue
            case = Case(system.name, workload.model, protocol, concurrency)
            measured.append(_measured(system, case, workload, options, answer_bytes))
    return measured


def _open_loop(
    system: RunningSystem, workload: Workload, options: OwnOptions, closed: Sequence[Measurement]
) -> list[Measurement]:
    highest = max((each.load.per_s for each in closed if each.case.protocol == "REST JSON"), default=0.0)
    if not highest:
        return []
    cases = [Case(system.name, workload.model, "REST JSON, open loop", 0, per_s=round(highest * rate)) for rate in options.rates]
    return [_measured(system, case, workload, options, 0) for case in cases]


def _measured(system: RunningSystem, case: Case, workload: Workload, options: OwnOptions, answer_bytes: int) -> Measurement:
    rounds = [measure(system, case, workload, seconds=options.seconds, answer_bytes=answer_bytes) for _ in range(options.rounds)]
    result = median(rounds)
    say(result)
    return result


def say(result: Measurement) -> None:
    """A progress line."""
    case, load = result.case, result.load
    at_once = f"{case.per_s:.0f}/s due" if case.per_s else f"{case.concurrency} at once"
    failed = f", {load.n_failed} FAILED" if load.n_failed else ""
    print(
        f"{case.system}, {case.model}, {case.protocol}, {at_once}: {load.per_s:.0f}/s, p50 {load.p50_ms:.2f} ms, "
        f"p99 {load.p99_ms:.2f} ms, CPU {cpu(result)} µs{failed}",
        flush=True,
    )


def cold_start_s(plan: SystemSpec, scratch: Path, n_starts: int) -> float:
    """Median of the seconds from the start of all processes at once until the proxy reports the demo models as ready."""
    times = []
    for _ in range(n_starts):
        with RunningSystem(plan, scratch) as system:
            times.append(systems.wait_until_ready(system, list(DEMOS)))
    return statistics.median(times)


__all__ = ["BenchmarkError", "OwnOptions", "OwnResults", "cold_start_s", "plan_of", "run", "say"]
