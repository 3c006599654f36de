"""A long mixed load on one machine, and whether memory and file descriptors stay as they are.

Requests by the Python client over REST and gRPC, each answer compared with the pipeline's, and bad ones among them that must be
refused. The first third of the time is for warming up; what is judged is the middle of the second third against that of the last.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarks import report, systems
from benchmarks.latencies import percentile
from benchmarks.processes import BenchmarkError, RunningSystem, tree
from benchmarks.steady import Reference, RequestOutcome, SteadyLoad
from splitserve.publishing import publish
from training.demo import DEMOS

SAMPLE_EVERY_S = 5.0
BAD_EVERY_S = 0.05

MOST_GROWTH_MB_PER_MIN = 1.0
MOST_GROWTH_FDS = 3

_BAD: tuple[tuple[str, bytes, int], ...] = (
    ("/v2/models/nope/infer", b'{"inputs": []}', 404),
    ("/v2/models/breast-cancer/infer", b'{"inputs": [', 400),
    ("/v2/models/breast-cancer/infer", b'{"inputs": []}', 400),
    (
        "/v2/models/digits/infer",
        b'{"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 8, 9], "data": [1]}]}',
        400,
    ),
    ("/v1/models/breast-cancer:predict", json.dumps({"instances": [[0.5] * 30, [None] * 30]}).encode(), 400),
)
"""Path, body, and the status that it must get."""


class Sample(msgspec.Struct, frozen=True):
    """One sample of the processes: PSS in MB and open file descriptors, by stage; ``at_s`` since the load began."""

    at_s: float
    pss_mb: dict[str, float]
    n_fds: dict[str, int]


class Growth(msgspec.Struct, frozen=True):
    """A stage's growth from the middle of the second third to that of the last."""

    stage: str
    pss_mb: tuple[float, float]
    growth_mb_per_min: float
    n_fds: tuple[int, int]

    @property
    def is_flat(self) -> bool:
        return self.growth_mb_per_min <= MOST_GROWTH_MB_PER_MIN and self.n_fds[1] <= self.n_fds[0] + MOST_GROWTH_FDS


class SoakResults(msgspec.Struct, frozen=True):
    """The result of a soak."""

    seconds: float
    per_s: float
    samples: list[Sample]
    verdicts: list[Growth]
    n_requests: int
    n_wrong: int
    failures: dict[str, int]
    bad: dict[str, int]
    latencies_ms: dict[str, tuple[float, float]]
    """p50 and p99 of the second and of the last third."""

    @property
    def n_failed(self) -> int:
        """What makes a soak fail, counted."""
        return (
            self.n_wrong
            + sum(self.failures.values())
            + sum(count for what, count in self.bad.items() if not what.startswith("refused"))
            + sum(not verdict.is_flat for verdict in self.verdicts)
        )

    def sections(self) -> dict[str, str]:
        """Markdown by heading."""
        rows = [
            [
                verdict.stage,
                *(f"{value:.1f}" for value in verdict.pss_mb),
                f"{verdict.growth_mb_per_min:+.2f}",
                *map(str, verdict.n_fds),
                "flat" if verdict.is_flat else "GROWS",
            ]
            for verdict in self.verdicts
        ]
        grown = report.table(
            ("stage", "PSS 2nd third, MB", "PSS last third, MB", "MB/min", "fds 2nd third", "fds last third", "verdict"), rows
        )
        load = report.table(
            ("what", "count"),
            [
                ["requests", str(self.n_requests)],
                ["of these with a wrong answer", str(self.n_wrong)],
                ["of these failed", str(sum(self.failures.values()))],
                *([f"failed: {what}", str(count)] for what, count in sorted(self.failures.items())),
                *([f"bad, {what}", str(count)] for what, count in sorted(self.bad.items())),
            ],
        )
        latencies = report.table(
            ("part", "p50 ms", "p99 ms"), [[part, f"{p50:.1f}", f"{p99:.1f}"] for part, (p50, p99) in self.latencies_ms.items()]
        )
        how = (
            f"Three processes on loopback, {self.seconds:.0f} s, {self.per_s:.0f} requests/s of 1 to 5 rows to the demo models "
            "by the Python client, over REST and gRPC in turn, each answer compared with the pipeline's; beside them up to "
            f"{1 / BAD_EVERY_S:.0f} bad requests/s. Samples every {SAMPLE_EVERY_S:g} s from /proc; the first third of the time "
            "is for warming up. PSS is the median of a third, file descriptors the least of it: connections come and go with "
            f"the load, what leaks stays. Flat: at most {MOST_GROWTH_MB_PER_MIN:g} MB/min and {MOST_GROWTH_FDS} descriptors "
            "more. The load runs on the same cores."
        )
        return {"How": how, "Memory and file descriptors": grown, "Requests": load, "Latency as the client sees it": latencies}


def run(seconds: float, per_s: float, settings: Mapping[str, str], scratch: Path) -> SoakResults:
    """Publish, start, load, sample, stop.

    Raises:
        BenchmarkError: the services do not start.
    """
    repository = scratch / "models"
    references = _publish(repository)
    with RunningSystem(systems.split(repository, settings), scratch) as system:
        systems.wait_until_ready(system, list(references))
        bad: Counter[str] = Counter()
        is_over = threading.Event()
        nuisance = threading.Thread(target=_send_bad, args=(system.http, bad, is_over))
        with SteadyLoad([f"http://{system.http}", f"grpc://{system.grpc}"], references, per_s=per_s) as load:
            began = time.monotonic()
            nuisance.start()
            try:
                samples = _watch(system, began, seconds)
            finally:
                is_over.set()
                nuisance.join()
    return SoakResults(
        seconds=seconds,
        per_s=per_s,
        samples=samples,
        verdicts=judge(samples, seconds),
        n_requests=len(load.outcomes),
        n_wrong=len(load.wrong),
        failures=dict(load.kinds()),
        bad=dict(bad),
        latencies_ms=_latencies(load.outcomes, began, seconds),
    )


def _publish(repository: Path) -> dict[str, Reference]:
    references = {}
    for name, (train, input_name) in DEMOS.items():
        pipeline, rows = train()
        publish(pipeline, rows, name=name, repository=repository, input_name=input_name)
        references[name] = Reference(pipeline, rows)
    return references


def _watch(system: RunningSystem, began: float, seconds: float) -> list[Sample]:
    samples: list[Sample] = []
    while (at_s := time.monotonic() - began) < seconds:
        samples.append(Sample(at_s, system.pss_mb(), {name: sum(map(_n_fds, tree(pid))) for name, pid in system.pids().items()}))
        time.sleep(SAMPLE_EVERY_S)
    return samples


def _n_fds(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def judge(samples: Sequence[Sample], seconds: float) -> list[Growth]:
    """The growth of each stage.

    Raises:
        BenchmarkError: there are too few samples.
    """
    middle = [sample for sample in samples if seconds / 3 <= sample.at_s < seconds * 2 / 3]
    last = [sample for sample in samples if seconds * 2 / 3 <= sample.at_s]
    if len(middle) < 3 or len(last) < 3:
        raise BenchmarkError(f"a soak of {seconds:g} s is too short for samples every {SAMPLE_EVERY_S:g} s")
    verdicts = []
    for stage in samples[0].pss_mb:
        before, after = (statistics.median(sample.pss_mb[stage] for sample in part) for part in (middle, last))
        fds = tuple(min(sample.n_fds[stage] for sample in part) for part in (middle, last))
        minutes = seconds / 3 / 60
        verdicts.append(Growth(stage, (before, after), (after - before) / minutes, (fds[0], fds[1])))
    return verdicts


def _latencies(outcomes: Sequence[RequestOutcome], began: float, seconds: float) -> dict[str, tuple[float, float]]:
    found = {}
    for part, start in (("second third", seconds / 3), ("last third", seconds * 2 / 3)):
        times = sorted(outcome.seconds * 1000 for outcome in outcomes if start <= outcome.began - began < start + seconds / 3)
        found[part] = (percentile(times, 50), percentile(times, 99))
    return found


def _send_bad(address: str, counts: Counter[str], is_over: threading.Event) -> None:
    """Bad requests one after the other, counted by whether each was refused as it must be."""
    turn = 0
    while not is_over.wait(BAD_EVERY_S):
        path, body, expected = _BAD[turn % len(_BAD)]
        turn += 1
        status = _status(f"http://{address}{path}", body)
        counts[f"refused with {status}" if status == expected else f"{path}: expected {expected}, got {status}"] += 1


def _status(url: str, body: bytes) -> int:
    try:
        with urllib.request.urlopen(url, body, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0
