"""``python -m benchmarks peers``: our services and their peers on the same work in one run, and the table of what must hold."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from benchmarks import answers, figures, systems
from benchmarks.figures import COMPILED, FUSED, SKLEARN, SPLIT, Medians
from benchmarks.measuring import Case, Measurement, Protocol, check, measure, median
from benchmarks.models import publish_demos, publish_tensors
from benchmarks.own import cold_start_s, say
from benchmarks.peer_systems import DESCRIPTIONS, GRPC_ECHO, HTTP_ECHO, KSERVE, PEERS, PLAIN, PYTRITON, SINGLE
from benchmarks.processes import BenchmarkError, RunningSystem, SystemSpec
from benchmarks.report import measurement_table, memory_table, table
from benchmarks.systems import Settings
from benchmarks.workloads import Workload

RUNTIME = "PREPROCESS_RUNTIME"
ECHOES = (HTTP_ECHO, GRPC_ECHO)
TENSOR_AT_ONCE = 4
SETTLE_S = 2.0
"""Over which the CPU time of idle systems is measured."""

CASES: Mapping[str, tuple[tuple[str, Protocol, int], ...]] = {
    SPLIT: (
        *(("breast-cancer", "REST JSON", concurrency) for concurrency in (1, 16, 64, 256)),
        ("breast-cancer", "gRPC unary", 1),
        ("breast-cancer", "gRPC unary", 64),
        ("breast-cancer", "gRPC stream", 64),
    ),
    FUSED: (("breast-cancer", "REST JSON", 1), ("breast-cancer", "REST JSON", 64)),
    SKLEARN: (("penguins", "REST JSON", 64),),
    COMPILED: (("penguins", "REST JSON", 64),),
    KSERVE: (
        *(("breast-cancer", "REST JSON", concurrency) for concurrency in (1, 16, 64)),
        ("breast-cancer", "gRPC unary", 1),
        ("breast-cancer", "gRPC unary", 64),
        ("penguins", "REST JSON", 64),
    ),
    PYTRITON: (
        *(("breast-cancer", "REST JSON", concurrency) for concurrency in (1, 16, 64)),
        ("breast-cancer", "gRPC unary", 64),
    ),
    PLAIN: (
        *(("breast-cancer", "REST JSON", concurrency) for concurrency in (1, 16, 64)),
        ("penguins", "REST JSON", 64),
    ),
    SINGLE: (
        *(("breast-cancer", "REST JSON", concurrency) for concurrency in (1, 16, 64)),
        ("penguins", "REST JSON", 64),
    ),
    HTTP_ECHO: (("breast-cancer", "REST JSON", 1), ("breast-cancer", "REST JSON", 64)),
    GRPC_ECHO: (("breast-cancer", "gRPC unary", 1), ("breast-cancer", "gRPC unary", 64)),
}
"""Model, protocol and requests in flight, by system."""


class ComparisonOptions(msgspec.Struct, frozen=True):
    """What to run. ``settings`` are those of our services."""

    peers: tuple[str, ...] = tuple(PEERS)
    seconds: float = 3.0
    rounds: int = 3
    n_cold_starts: int = 3
    settings: Settings = {}


class Side:
    """One system that takes part: running, checked."""

    def __init__(self, system: RunningSystem, workloads: Mapping[str, Workload], cases: list[Case], answer_bytes: int) -> None:
        self.system = system
        self.workloads = workloads
        self.cases = cases
        self.answer_bytes = answer_bytes

    def measure(self, case: Case, seconds: float) -> Measurement:
        return measure(self.system, case, self.workloads[case.model], seconds=seconds, answer_bytes=self.answer_bytes)


class ComparisonResults:
    """Results so far."""

    def __init__(self) -> None:
        self.rounds: dict[Case, list[Measurement]] = {}
        self.open_loop: list[Measurement] = []
        self.tensors: list[Measurement] = []
        self.tensor_mb_per_s: dict[str, float] = {}
        self.pss_mb: dict[str, dict[str, float]] = {}
        self.peak_mb: dict[str, dict[str, float]] = {}
        self.cold_start_s: float | None = None
        self.idle_cpu: dict[str, float] = {}
        self.skipped: list[str] = []

    def skip(self, what: str) -> None:
        self.skipped.append(what)
        print(f"not measured: {what}", flush=True)

    def add(self, measurement: Measurement) -> None:
        self.rounds.setdefault(measurement.case, []).append(measurement)

    @property
    def medians(self) -> list[Measurement]:
        return [median(rounds) for rounds in self.rounds.values()]

    @property
    def n_failed_of_ours(self) -> int:
        ours = [each for each in self.medians if each.case.system not in PEERS]
        return sum(each.load.n_failed for each in (*ours, *self.open_loop, *self.tensors))

    def outcome(self) -> Medians:
        return Medians(
            self.medians,
            open_loop=median(self.open_loop) if self.open_loop else None,
            tensor_mb_per_s=self.tensor_mb_per_s,
            pss_mb=sum(self.pss_mb[SPLIT].values()) if SPLIT in self.pss_mb else None,
            cold_start_s=self.cold_start_s,
        )

    def sections(self) -> dict[str, str]:
        """Markdown by heading."""
        remarks = figures.remarks(self.outcome())
        described = {name: text for name, text in DESCRIPTIONS.items() if any(case.system == name for case in self.rounds)}
        sections = {
            "What must hold": figures.figure_table(figures.figures(self.outcome()))
            + "".join(f"\n\n{name}: {value:.2g} times." for name, value in remarks.items() if value),
            "Side by side": measurement_table(_by_work(self.medians)),
            "602 kB tensor": measurement_table(self.tensors),
            "Open loop": measurement_table([median(self.open_loop)]) if self.open_loop else "",
            "Memory after load": memory_table(self.pss_mb, self.peak_mb),
            "CPU while idle": table(("system", "% of a core"), [[name, f"{part:.1%}"] for name, part in self.idle_cpu.items()]),
            "The peers": "\n".join(f"- {name}: {text}" for name, text in described.items()),
            "Not measured": "\n".join(f"- {each}" for each in self.skipped),
        }
        return {heading: text for heading, text in sections.items() if text}

    def data(self) -> dict[str, object]:
        return {
            "figures": [{"met": each.is_met, **msgspec.to_builtins(each)} for each in figures.figures(self.outcome())],
            "medians": self.medians,
            "rounds": [each for rounds in self.rounds.values() for each in rounds],
            "open_loop": self.open_loop,
            "tensors": self.tensors,
            "pss_mb": self.pss_mb,
            "peak_rss_mb": self.peak_mb,
            "cold_start_s": self.cold_start_s,
            "idle_cpu": self.idle_cpu,
            "not_measured": self.skipped,
        }


def _by_work(measurements: Iterable[Measurement]) -> list[Measurement]:
    """What is to be compared side by side, the most requests first."""
    return sorted(measurements, key=lambda each: (each.case.model, each.case.protocol, each.case.concurrency, -each.load.per_s))


def run(options: ComparisonOptions, scratch: Path) -> ComparisonResults:
    """Run what the options name.

    Args:
        options: what to run.
        scratch: a folder for repositories and logs.

    Raises:
        BenchmarkError: one of our systems does not start, or answers wrongly. A peer that does so is omitted and reported.
    """
    found = ComparisonResults()
    repository = scratch / "demos"
    demos = publish_demos(repository)
    tensors = publish_tensors(scratch / "tensors")
    plan = systems.split(repository, options.settings, SPLIT)
    if options.n_cold_starts:
        found.cold_start_s = cold_start_s(plan, scratch, options.n_cold_starts)
        print(f"cold start: {found.cold_start_s:.2f} s", flush=True)
    _measure_memory(plan, demos, options, scratch, found)
    _measure_tensors(systems.split(scratch / "tensors", options.settings, SPLIT), tensors, options, scratch, found)
    with ExitStack() as stack:
        sides = _start(options, repository, demos, scratch, stack, found)
        found.idle_cpu = _idle_cpu([side.system for side in sides])
        _side_by_side(sides, options, found)
        _open_loop(next(side for side in sides if side.system.name == SPLIT), options, found)
    return found


def _measure_memory(
    plan: SystemSpec, demos: Mapping[str, Workload], options: ComparisonOptions, scratch: Path, found: ComparisonResults
) -> None:
    """With nothing else running, since pages that are shared with others count less."""
    with RunningSystem(plan, scratch) as system:
        systems.wait_until_ready(system, list(demos))
        for workload in demos.values():
            check(system, workload, ["REST JSON"])
            measure(system, Case(SPLIT, workload.model, "REST JSON", 64), workload, seconds=options.seconds)
        found.pss_mb[SPLIT], found.peak_mb[SPLIT] = system.pss_mb(), system.peak_rss_mb()


def _measure_tensors(
    plan: SystemSpec, tensors: Mapping[str, Workload], options: ComparisonOptions, scratch: Path, found: ComparisonResults
) -> None:
    protocols: tuple[Protocol, ...] = ("REST binary", "gRPC unary")
    with RunningSystem(plan, scratch) as system:
        systems.wait_until_ready(system, list(tensors))
        for workload in tensors.values():
            answer_bytes = check(system, workload, protocols)
            cases = [Case(SPLIT, workload.model, protocol, TENSOR_AT_ONCE) for protocol in protocols]
            for case in cases:
                rounds = [
                    measure(system, case, workload, seconds=options.seconds, answer_bytes=answer_bytes)
                    for _ in range(options.rounds)
                ]
                middle = median(rounds)
                say(middle)
                found.tensors.append(middle)
                rate = middle.load.per_s * workload.bytes_in() / 1e6
                found.tensor_mb_per_s[workload.model] = max(rate, found.tensor_mb_per_s.get(workload.model, 0.0))


def _start(
    options: ComparisonOptions,
    repository: Path,
    demos: Mapping[str, Workload],
    scratch: Path,
    stack: ExitStack,
    found: ComparisonResults,
) -> list[Side]:
    sides = []
    for plan in _own_plans(repository, options.settings, found):
        system = stack.enter_context(RunningSystem(plan, scratch))
        systems.wait_until_ready(system, list(demos))
        sides.append(_side(system, demos, found))
    for name in options.peers:
        # Its own stack, so that a failing peer is stopped at once.
        with ExitStack() as attempt:
            try:
                system = attempt.enter_context(RunningSystem(PEERS[name](repository), scratch))
                _wait_until_answering(system, demos)
                sides.append(_side(system, demos, found))
            except BenchmarkError as error:
                found.skip(f"{name}: {error}")
                continue
            stack.push(attempt.pop_all())
    return sides


def _own_plans(repository: Path, settings: Settings, found: ComparisonResults) -> list[SystemSpec]:
    plans = [
        systems.split(repository, settings, SPLIT),
        systems.fused(repository, settings, FUSED),
        systems.split(repository, {**settings, RUNTIME: "sklearn"}, SKLEARN),
    ]
    if (repository / "penguins" / "preprocess" / "1" / "pipeline.onnx").exists():
        plans.append(systems.split(repository, {**settings, RUNTIME: "onnx"}, COMPILED))
    else:
        found.skip(f"{COMPILED}: penguins was published without a compiled form")
    return plans


def _wait_until_answering(system: RunningSystem, demos: Mapping[str, Workload]) -> None:
    model, protocol, _ = CASES[system.name][0]
    workload = demos[model]
    if protocol == "gRPC unary":
        system.wait_until(lambda: answers.is_answering_grpc(system.grpc, workload), "waiting for an answer")
    else:
        body = workload.rest_json(0)
        system.wait_until(lambda: answers.is_answering(system.http, model, body), "waiting for an answer")


def _side(system: RunningSystem, demos: Mapping[str, Workload], found: ComparisonResults) -> Side:
    cases = [Case(system.name, *case) for case in CASES[system.name]]
    if system.name in ECHOES:
        return Side(system, demos, cases, answer_bytes=len(demos["breast-cancer"].grpc(0)))
    answer_bytes = 0
    for model in sorted({case.model for case in cases}):
        protocols = [case.protocol for case in cases if case.model == model]
        answer_bytes = check(system, demos[model], protocols) or answer_bytes
        if "gRPC stream" in protocols and not answers.offers_stream(system.grpc, demos[model]):
            found.skip(f"{system.name}, {model}, gRPC stream: the server has none")
            cases = [case for case in cases if case.protocol != "gRPC stream"]
    print(f"{system.name}: started, answers are right", flush=True)
    return Side(system, demos, cases, answer_bytes)


def _idle_cpu(running: Sequence[RunningSystem]) -> dict[str, float]:
    """Cores that each system takes with nothing to do."""
    before = {system.name: sum(system.cpu_s().values()) for system in running}
    time.sleep(SETTLE_S)
    return {system.name: (sum(system.cpu_s().values()) - before[system.name]) / SETTLE_S for system in running}


def _side_by_side(sides: Sequence[Side], options: ComparisonOptions, found: ComparisonResults) -> None:
    """Case by case over all systems, so that what is compared is measured close together; another system first each round."""
    work = sorted({(case.model, case.protocol, case.concurrency) for side in sides for case in side.cases})
    for number in range(options.rounds):
        first = number * len(sides) // options.rounds
        for which in work:
            for side in [*sides[first:], *sides[:first]]:
                for case in side.cases:
                    if (case.model, case.protocol, case.concurrency) == which:
                        _add(side, case, options.seconds, found)


def _add(side: Side, case: Case, seconds: float, found: ComparisonResults) -> None:
    try:
        measurement = side.measure(case, seconds)
    except BenchmarkError as error:
        if case.system not in PEERS:
            raise
        found.skip(f"{case.system}, {case.model}, {case.protocol}, {case.concurrency} at once: {error}")
        return
    say(measurement)
    found.add(measurement)


def _open_loop(side: Side, options: ComparisonOptions, found: ComparisonResults) -> None:
    rates = [each.load.per_s for each in found.medians if each.case.system == SPLIT and each.case.protocol == "REST JSON"]
    case = Case(SPLIT, "breast-cancer", "REST JSON, open loop", 0, per_s=round(max(rates) / 2))
    for _ in range(options.rounds):
        measurement = side.measure(case, 2 * options.seconds)
        say(measurement)
        found.open_loop.append(measurement)
