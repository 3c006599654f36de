"""``python -m benchmarks jobs FIGURE``: what jobs cost, what they cost others, and how soon they are cancelled or taken again.

All on one machine, SQLite, breast-cancer, one row a job. What the machine's other work would distort is given as CPU time, and as
ratios of runs that alternate.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec

from benchmarks import loads, systems
from benchmarks.latencies import LoadResult, percentile
from benchmarks.models import publish_demos
from benchmarks.processes import BenchmarkError, RunningSystem
from benchmarks.report import table
from benchmarks.systems import Settings
from benchmarks.workloads import RestBody, Workload
from splitserve.api.inference import inference_pb2
from splitserve.api.splitserve.jobs.v1 import jobs_pb2
from splitserve.jobs import protobuf
from splitserve.jobs.folder import DATABASE
from splitserve.jobs.payloads import Payloads
from splitserve.jobs.records import Finish, NewJob, Payload, new_id
from splitserve.jobs.sqlite import SqliteStore
from splitserve.jobs.worker import Worker
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature

MODEL = "breast-cancer"
AT_ONCE = 64
SYNC_AT_ONCE = 256
CLAIMED_AT_ONCE = 64
ENDLESS_PER_S = 30_000.0
"""Arrivals that no machine keeps up with."""

SUBMIT_PATH = f"/{protobuf.SERVICE}/SubmitJob"
SUBMITS_PER_S = 500.0
MOST_DELAY_S = 0.005
"""Between a submit and its cancel: for as long a job may run."""

ORPHAN_LEASES_S = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)

DAY_S, N_DAYS, DAY_PER_S = 12.0, 15, 200.0
"""The time to live of jobs, how many of these times the load lasts, and its rate."""

NO_SETTINGS: Settings = {}
NOWHERE: Settings = {"JOBS_PROXY_TARGET": "127.0.0.1:9"}
"""The worker finds no proxy, so that jobs stay queued."""


class JobsOptions(msgspec.Struct, frozen=True):
    """What to run. ``settings`` are the services'."""

    seconds: float = 5.0
    rounds: int = 3
    n_jobs: int = 20_000
    n_queued: int = 100_000
    settings: Settings = {}


class Figure(msgspec.Struct, frozen=True):
    """A figure: its rows, and what they mean."""

    headers: tuple[str, ...]
    rows: list[list[str]]
    facts: dict[str, Any]
    """For programs."""

    n_failed: int = 0

    def __str__(self) -> str:
        return table(self.headers, self.rows)


def submitted(workload: Workload) -> RestBody:
    """A row as a submit over REST."""
    body = workload.rest_json(0)
    return RestBody(body.content, (*body.headers, ("prefer", "respond-async")))


FIGURES = ("submits", "worked-off", "interactive", "cancel", "orphan", "day")


def run(names: Sequence[str], options: JobsOptions, scratch: Path) -> dict[str, Figure]:
    """Measure these of the `FIGURES`.

    Raises:
        BenchmarkError: the services do not start, or do something wrong.
    """
    bench = Bench(options, scratch)
    return {name: getattr(bench, name.replace("-", "_"))() for name in names}


class Bench:
    """The models, published once for all figures.

    Args:
        options: what to run.
        scratch: a folder on a disk.
    """

    def __init__(self, options: JobsOptions, scratch: Path) -> None:
        self.options = options
        self._scratch = scratch
        self.workload = publish_demos(scratch / "demos")[MODEL]
        self._n_folders = 0

    def _folder(self) -> Path:
        """A new one for jobs."""
        self._n_folders += 1
        return self._scratch / f"jobs-{self._n_folders}"

    def system(self, folder: Path, settings: Settings = NO_SETTINGS) -> RunningSystem:
        """The services, with their jobs in that folder."""
        spec = systems.with_jobs(self._scratch / "demos", folder, {**self.options.settings, **settings})
        return RunningSystem(spec, self._scratch)

    def submits(self) -> Figure:
        """Durable submits, 64 at once: alone, over REST and over gRPC, and while the jobs are worked off."""
        rows: list[list[str]] = []
        facts: dict[str, Any] = {}
        kinds = (
            ("REST", "queued only", NOWHERE),
            ("gRPC", "queued only", NOWHERE),
            ("REST", "worked off meanwhile", NO_SETTINGS),
        )
        for protocol, name, settings in kinds:
            with self.system(self._folder(), settings) as system:
                systems.wait_until_ready(system, [MODEL])
                submit = self._submit_rest if protocol == "REST" else self._submit_grpc
                submit(system, 1.0)
                found, costs = [], []
                for _ in range(self.options.rounds):
                    before = system.cpu_s()
                    load = submit(system, self.options.seconds)
                    after = system.cpu_s()
                    found.append(load)
                    costs.append({stage: (after[stage] - before[stage]) / load.n_requests * 1e6 for stage in after})
            middle = sorted(found, key=lambda load: load.per_s)[len(found) // 2]
            cpu = {stage: statistics.median(cost[stage] for cost in costs) for stage in costs[0]}
            n_failed = sum(load.n_failed for load in found)
            facts[f"{protocol}, {name}"] = {"loads": found, "cpu_us": costs}
            rates = f"{min(load.per_s for load in found):.0f} to {max(load.per_s for load in found):.0f}"
            latencies = [f"{middle.p50_ms:.1f}", f"{middle.p99_ms:.1f}"]
            rows.append([f"{protocol}, {name}", f"{middle.per_s:.0f} ({rates})", *latencies, _cpu(cpu), str(n_failed)])
        headers = ("submits", "a second", "p50 ms", "p99 ms", "CPU µs a submit", "failed")
        return Figure(headers, rows, facts, n_failed=sum(int(row[-1]) for row in rows))

    def _submit_rest(self, system: RunningSystem, seconds: float) -> LoadResult:
        return loads.rest(system.http, MODEL, submitted(self.workload), concurrency=AT_ONCE, seconds=seconds)

    def _submit_grpc(self, system: RunningSystem, seconds: float) -> LoadResult:
        request = inference_pb2.ModelInferRequest.FromString(self.workload.grpc(0))
        message = jobs_pb2.SubmitJobRequest(request=request).SerializeToString()
        with grpc.insecure_channel(system.grpc) as channel:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(SUBMIT_PATH)
            answer_bytes = len(call(message))
        return loads.grpc_unary(system.grpc, message, answer_bytes, concurrency=AT_ONCE, seconds=seconds, path=SUBMIT_PATH)

    def worked_off(self) -> Figure:
        """Queued jobs, without other load; the same requests sent synchronously; and what the store does for jobs, by itself."""
        filled = self._filled(self.options.n_jobs)
        rates, jobs_us, sync_us, store_us = [], [], [], []
        for _ in range(self.options.rounds):
            folder = self._folder()
            shutil.copytree(filled, folder)
            with self.system(folder) as system:
                per_s, cpu = self._work_off(system, folder)
                rates.append(per_s)
                jobs_us.append(cpu)
                before = system.cpu_s()
                load = loads.grpc_stream(system.grpc, self.workload, concurrency=SYNC_AT_ONCE, seconds=self.options.seconds)
                after = system.cpu_s()
                sync_us.append(sum(after[stage] - before[stage] for stage in after) / load.n_requests * 1e6)
            store_us.append(store_cpu_us(self._folder(), self.options.n_jobs, self.workload.grpc(0)))
        cpu_us = {stage: statistics.median(each[stage] for each in jobs_us) for stage in jobs_us[0]}
        sync, store = statistics.median(sync_us), statistics.median(store_us)
        ratios = [sum(jobs.values()) / (sync + store) for jobs, sync, store in zip(jobs_us, sync_us, store_us, strict=True)]
        rows = [
            ["jobs worked off a second", f"{statistics.median(rates):.0f}"],
            ["CPU µs a job", _cpu(cpu_us)],
            ["CPU µs a request, synchronously (gRPC stream)", f"{sync:.0f}"],
            ["CPU µs a job in the store (claim and finish)", f"{store:.0f}"],
            ["CPU of jobs / the sum of both", f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"],
        ]
        facts = {"per_s": rates, "jobs_us": jobs_us, "sync_us": sync_us, "store_us": store_us, "ratios": ratios}
        return Figure(("what", "value"), rows, facts)

    def interactive(self) -> Figure:
        """Latencies of other requests, open loop at half of the maximum, while jobs are worked off and while they are not.

        In turn on the same processes: the jobs service is stopped and continued.
        """
        filled = self._filled(self.options.n_queued)
        rounds = []
        with self.system(filled) as system:
            systems.wait_until_ready(system, [MODEL])
            with stopped(system):
                most = max(self._open_loop(system, ENDLESS_PER_S, 2.0).per_s for _ in range(2))
            per_s = most / 2
            for _ in range(self.options.rounds):
                with stopped(system):
                    without = self._open_loop(system, per_s, self.options.seconds)
                before, began = n_jobs_of(filled, "succeeded"), time.perf_counter()
                beside = self._open_loop(system, per_s, self.options.seconds)
                jobs_per_s = (n_jobs_of(filled, "succeeded") - before) / (time.perf_counter() - began)
                if not n_jobs_of(filled, "queued"):
                    break  # the queue was empty before the end
                rounds.append((without, beside, jobs_per_s))
                print(f"p99 {without.p99_ms:.1f} ms without, {beside.p99_ms:.1f} ms beside {jobs_per_s:.0f} jobs/s", flush=True)
        if not rounds:
            raise BenchmarkError("the jobs ended before the load: more --jobs are needed, or fewer --seconds")
        ratios = {
            name: [getattr(beside, name) / getattr(without, name) for without, beside, _ in rounds]
            for name in ("p50_ms", "p99_ms")
        }
        rows = [
            ["other requests a second", f"{per_s:.0f} of {most:.0f}"],
            *(
                [
                    f"{name.removesuffix('_ms')} ms without jobs, beside jobs",
                    f"{_median(rounds, 0, name):.2f}, {_median(rounds, 1, name):.2f}",
                ]
                for name in ("p50_ms", "p99_ms")
            ),
            *(
                [
                    f"{name.removesuffix('_ms')} beside / without",
                    f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})",
                ]
                for name, each in ratios.items()
            ),
            ["jobs a second meanwhile", f"{statistics.median(each for *_, each in rounds):.0f}"],
        ]
        n_failed = sum(load.n_failed for without, beside, _ in rounds for load in (without, beside))
        return Figure(("what", "value"), rows, {"rounds": rounds, "most_per_s": most, "ratios": ratios}, n_failed)

    def _open_loop(self, system: RunningSystem, per_s: float, seconds: float, body: RestBody | None = None) -> LoadResult:
        return loads.open_loop(system.http, MODEL, body or self.workload.rest_json(0), per_s=per_s, seconds=seconds)

    def cancel(self) -> Figure:
        """Until a job is cancelled, one after the other, while others are submitted: queued ones, and ones that run."""
        milliseconds: dict[str, list[float]] = {"queued": [], "running": []}
        n_wrong = self._cancel(NOWHERE, milliseconds) + self._cancel(NO_SETTINGS, milliseconds)
        rows = []
        for state, found in milliseconds.items():
            found.sort()
            times_ms = (percentile(found, 50), percentile(found, 99), found[-1])
            rows.append([state, str(len(found)), *(f"{time_ms:.1f}" for time_ms in times_ms)])
        facts = {"milliseconds": milliseconds, "submits_per_s": SUBMITS_PER_S}
        return Figure(("cancelled", "jobs", "p50 ms", "p99 ms", "max ms"), rows, facts, n_wrong)

    def _cancel(self, settings: Settings, milliseconds: dict[str, list[float]]) -> int:
        """Cancel jobs soon after their submits, until each state has some. Returns how many answers were wrong."""
        n_wrong = 0
        with self.system(self._folder(), settings) as system, ThreadPoolExecutor(1) as others:
            systems.wait_until_ready(system, [MODEL])
            load = others.submit(self._open_loop, system, SUBMITS_PER_S, self.options.seconds, submitted(self.workload))
            with httpx.Client(base_url=f"http://{system.http}") as client:
                body = submitted(self.workload)
                expected = "queued" if settings is NOWHERE else "running"
                while not load.done() or not milliseconds[expected]:
                    job = client.post(f"/v2/models/{MODEL}/infer", content=body.content, headers=dict(body.headers)).json()
                    time.sleep(0 if settings is NOWHERE else random.uniform(0, MOST_DELAY_S))  # noqa: S311
                    began = time.perf_counter()
                    answer = client.delete(job["urls"]["self"], params={"keep_ended": "true"})
                    took_ms = (time.perf_counter() - began) * 1e3
                    state = answer.json()
                    if state["status"] == "cancelled":
                        milliseconds["running" if state["started"] else "queued"].append(took_ms)
                    else:  # it had ended
                        n_wrong += answer.status_code != 200 or settings is NOWHERE
        return n_wrong

    def orphan(self) -> Figure:
        """How long after its lease a job is taken again whose worker has died: workers in this process, on one store."""
        request = self.workload.grpc(0)
        late_s = {lease_s: asyncio.run(orphan_late_s(self._folder(), request, lease_s)) for lease_s in ORPHAN_LEASES_S}
        rows = [[f"{lease_s:g}", f"{late:.2f}"] for lease_s, late in late_s.items()]
        return Figure(("lease, s", "taken again s after it"), rows, {"late_s": late_s})

    def day(self) -> Figure:
        """A steady rate of jobs whose time to live is a small part of the load: what the disk and the memory hold."""
        folder, samples = self._folder(), []
        settings = {"JOBS_TTL_S": f"{DAY_S:g}", "JOBS_KEY_TTL_S": f"{DAY_S:g}"}
        seconds = N_DAYS * DAY_S
        with self.system(folder, settings) as system, ThreadPoolExecutor(1) as others:
            systems.wait_until_ready(system, [MODEL])
            load = others.submit(self._open_loop, system, DAY_PER_S, seconds, submitted(self.workload))
            while not load.done():
                disk = sum(file.stat().st_size for file in folder.iterdir() if file.name.startswith(DATABASE)) / 1e6
                samples.append((disk, system.pss_mb()["jobs"]))
                time.sleep(seconds / 60)
            n_kept = n_jobs_of(folder, "queued", "running", "succeeded", "failed")
        third = len(samples) // 3
        rows = []
        for name, which in (("database and WAL, MB", 0), ("memory of the jobs service (PSS), MB", 1)):
            parts = [statistics.median(sample[which] for sample in samples[n * third : (n + 1) * third]) for n in range(3)]
            rows.append([name, *(f"{part:.1f}" for part in parts), f"{parts[2] / parts[1]:.2f}"])
        result = load.result()
        rows.append(["jobs", str(result.n_requests), f"{DAY_PER_S:g}/s", f"{n_kept} kept at the end", ""])
        facts = {"samples": samples, "load": result, "ttl_s": DAY_S, "n_kept": n_kept}
        headers = ("what", "first third", "second third", "last third", "last / second")
        return Figure(headers, rows, facts, result.n_failed)

    def _filled(self, n_jobs: int) -> Path:
        """A folder with so many queued jobs, submitted over REST."""
        folder = self._folder()
        with self.system(folder, NOWHERE) as system:
            systems.wait_until_ready(system, [MODEL])
            while (n_queued := n_jobs_of(folder, "queued")) < n_jobs:
                seconds = 1.0 if n_jobs - n_queued < 5_000 else 5.0
                loads.rest(system.http, MODEL, submitted(self.workload), concurrency=AT_ONCE, seconds=seconds)
        return folder

    def _work_off(self, system: RunningSystem, folder: Path) -> tuple[float, dict[str, float]]:
        """Jobs a second and CPU µs a job by stage, between a tenth and nine tenths of them."""
        n_all = n_jobs_of(folder, "queued", "running", "succeeded")

        def sample_at(share: float) -> tuple[float, int, dict[str, float]]:
            system.wait_until(lambda: n_jobs_of(folder, "succeeded") >= share * n_all, "waiting for its jobs")
            return time.perf_counter(), n_jobs_of(folder, "succeeded"), system.cpu_s()

        (t0, n0, cpu0), (t1, n1, cpu1) = sample_at(0.1), sample_at(0.9)
        system.wait_until(lambda: n_jobs_of(folder, "succeeded") == n_all, "waiting for its jobs")
        return (n1 - n0) / (t1 - t0), {stage: (cpu1[stage] - cpu0[stage]) / (n1 - n0) * 1e6 for stage in cpu1}


async def orphan_late_s(folder: Path, request: bytes, lease_s: float) -> float:
    """Seconds after the end of its lease until a job is sent again, whose worker does not renew it any more."""
    store = SqliteStore(folder)
    store.open()
    await store.submit(NewJob(id=new_id(), owner="", model=MODEL, version="1.1", request=Payload(request)))
    inference = FakeInference(signature(MODEL, [TensorSpec("features", "FP64", ("batch", 30))], version="1.1"))
    worker = Worker(store, inference, Payloads(str(folder / "payloads"), inline_bytes=1 << 20))
    ends_at = time.perf_counter() + lease_s
    await store.claim("one that dies", 1, lease_s)
    working = asyncio.create_task(worker.run())
    while not inference.requests:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.005)
    late_s = time.perf_counter() - ends_at
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await store.close()
    return late_s


def _median(rounds: Sequence[tuple[LoadResult, LoadResult, float]], which: int, name: str) -> float:
    values: list[float] = [getattr(each[which], name) for each in rounds]
    return statistics.median(values)


@contextlib.contextmanager
def stopped(system: RunningSystem) -> Iterator[None]:
    """The jobs service does nothing meanwhile."""
    pid = system.pids()["jobs"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def n_jobs_of(folder: Path, *statuses: str) -> int:
    """Jobs in these states, read from the database beside the service."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{folder / DATABASE}?mode=ro", uri=True)) as connection:
            return sum(n for status, n in connection.execute("SELECT status, n FROM tallies") if status in statuses)
    except sqlite3.Error:  # it is not made yet
        return 0


def store_cpu_us(folder: Path, n_jobs: int, request: bytes) -> float:
    """CPU µs of this process to claim and finish a job, as many at once as the worker."""

    async def run() -> float:
        store = SqliteStore(folder)
        store.open()
        jobs = [
            NewJob(id=new_id(), owner="", model=MODEL, version="1.1", request=Payload(request), rendering=b"{}")
            for _ in range(n_jobs)
        ]
        for start in range(0, n_jobs, AT_ONCE):
            await asyncio.gather(*[store.submit(job) for job in jobs[start : start + AT_ONCE]])
        began, n_done = time.process_time(), 0
        while claims := await store.claim("benchmark", CLAIMED_AT_ONCE, 60.0):
            n_done += sum(await store.finish([Finish(claimed.lease, Payload(request)) for claimed in claims]))
        spent = time.process_time() - began
        await store.close()
        if n_done != n_jobs:
            raise BenchmarkError(f"the store: expected {n_jobs} jobs, finished {n_done}")
        return spent / n_jobs * 1e6

    return asyncio.run(run())


def _cpu(cpu_us: Mapping[str, float]) -> str:
    parts = " + ".join(f"{value:.0f} {stage}" for stage, value in cpu_us.items())
    return f"{sum(cpu_us.values()):.0f} = {parts}"
