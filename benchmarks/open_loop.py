"""Open-loop load: requests arrive on a schedule, whether or not earlier ones have been answered.

Arrivals are random (a Poisson process with a fixed seed). A request's latency counts from the moment when it was due. The load
generator is a C program, `open_loop.c`, which the system's compiler makes: an interpreter would be late itself where a request
takes less than a millisecond.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

from benchmarks.latencies import LoadResult, of_latencies
from benchmarks.processes import BenchmarkError, run_tool

N_CONNECTIONS = 128
SEED = 0
DRAIN_S = 5.0
"""How long to wait for answers after the last arrival; requests that are open then have failed."""

_SOURCE = Path(__file__).with_suffix(".c")


def poisson(per_s: float, seconds: float, seed: int = SEED) -> list[float]:
    """Times at which requests are due: on average ``per_s`` in a second, independent of each other."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    times: list[float] = []
    at = chance.expovariate(per_s)
    while at < seconds:
        times.append(at)
        at += chance.expovariate(per_s)
    return times


def request_bytes(address: str, path: str, body: bytes, headers: Sequence[tuple[str, str]]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"host: {address}", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def load(address: str, request: bytes, due: Sequence[float], *, n_connections: int = N_CONNECTIONS) -> LoadResult:
    """Send a request at each of the times, over HTTP/1.1.

    Args:
        address: host and port.
        request: its bytes.
        due: seconds from now, ascending.
        n_connections: requests in flight at most; those beyond wait for one, which counts as latency.

    Raises:
        BenchmarkError: there is no compiler, the server cannot be reached, or nothing was answered.
    """
    host, _, port = address.rpartition(":")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "request").write_bytes(request)
        (folder / "due").write_bytes(array("d", due).tobytes())
        run_tool([_compiler(), "-O2", "-o", str(folder / "open_loop"), str(_SOURCE)])
        command = [str(folder / "open_loop"), host, port, str(n_connections), f"{DRAIN_S:g}"]
        began = time.perf_counter()
        written = run_tool([*command, str(folder / "request"), str(folder / "due")], (due[-1] if due else 0.0) + DRAIN_S)
        seconds = time.perf_counter() - began  # until the last answer: longer than the schedule if the server cannot keep up
    latencies_ms = array("d", written)
    good = [latency_ms for latency_ms in latencies_ms if latency_ms >= 0]
    return of_latencies(good, seconds=seconds, n_failed=len(latencies_ms) - len(good))


def _compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        raise BenchmarkError("the open-loop load generator needs a C compiler (cc or gcc)")
    return found
