"""Closed-loop load: wrk for REST, h2load for gRPC calls, `benchmarks.stream_client` for the gRPC stream.

Each keeps a number of requests in flight and sends the next when one is answered. So under overload they slow down with the
server, and see less of its queue than independent callers would; for those there is `benchmarks.open_loop`.
"""

from __future__ import annotations

import pickle
import re
import shutil
import sys
import tempfile
from pathlib import Path

import msgspec

from benchmarks import open_loop as generator
from benchmarks.latencies import LoadResult, of_latencies
from benchmarks.processes import BenchmarkError, run_tool
from benchmarks.workloads import RestBody, Workload, grpc_frame

TOOLS = {"wrk": "wrk", "h2load": "nghttp2-client"}
"""Programs that are needed, and the Debian packages that have them."""

GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")
UNARY_PATH = "/inference.GRPCInferenceService/ModelInfer"
STREAM_PATH = "/inference.GRPCInferenceService/ModelStreamInfer"

MAX_GRPC_CONNECTIONS = 4
"""Calls of gRPC are spread over that many connections at most: clients multiplex them."""

_WRK = Path(__file__).with_name("wrk.lua")


def missing_tools() -> list[str]:
    """What is not installed, with the package that has it."""
    return [f"{tool} (Debian: apt-get install {package})" for tool, package in TOOLS.items() if not shutil.which(tool)]


def rest(address: str, model: str, body: RestBody, *, concurrency: int, seconds: float) -> LoadResult:
    """Load by wrk, which takes whole seconds only: a connection for each request in flight."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(body.content)
        file.flush()
        headers = [text for header in body.headers for text in header]
        command = ["wrk", "-t1", f"-c{concurrency}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "-s", str(_WRK)]
        command += [f"http://{address}/v2/models/{model}/infer", "--", file.name, *headers]
        return parse_wrk(run_tool(command, seconds).decode(errors="replace"))


def parse_wrk(output: str) -> LoadResult:
    """What ``wrk.lua`` has printed."""
    line = next((line for line in output.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise BenchmarkError(f"wrk gave no result:\n{output}")
    return msgspec.json.decode(line.removeprefix("RESULT "), type=LoadResult)


def grpc_unary(
    address: str, message: bytes, answer_bytes: int, *, concurrency: int, seconds: float, path: str = UNARY_PATH
) -> LoadResult:
    """Load by h2load.

    Args:
        address: of the server.
        message: the request, a ModelInferRequest unless ``path`` is another method's.
        answer_bytes: size of the right answer. h2load knows nothing of gRPC's statuses, but an error has no message: if too few
            bytes came, calls have failed.
        concurrency: calls in flight.
        seconds: how long.
        path: of the method.
    """
    n_connections = min(concurrency, MAX_GRPC_CONNECTIONS)
    with tempfile.TemporaryDirectory() as scratch:
        body, log = Path(scratch, "body"), Path(scratch, "log")
        body.write_bytes(grpc_frame(message))
        command = ["h2load", "-t1", f"-c{n_connections}", f"-m{concurrency // n_connections}", f"-D{seconds:g}"]
        # Windows of 2^30 bytes: flow control is the server's to show, not the client's.
        command += ["-w30", "-W30", "--log-file", str(log), "-d", str(body)]
        command += [argument for header in GRPC_HEADERS for argument in ("-H", header)]
        output = run_tool([*command, f"http://{address}{path}"], seconds).decode(errors="replace")
        return parse_h2load(output, log.read_text(), answer_bytes + 5, concurrency)


def parse_h2load(output: str, log: str, frame_bytes: int, concurrency: int) -> LoadResult:
    """What h2load printed, and its log: a line for each request with start, HTTP status and microseconds.

    Args:
        output: what it printed.
        log: its log.
        frame_bytes: size of an answer with its gRPC prefix.
        concurrency: requests that may have been cut off at the end.
    """
    seconds = _number(r"finished in ([\d.]+)s", output)
    data_bytes = _number(r"headers[^\n]*, [\d.]+\w* \((\d+)\) data", output)
    rows = [line.split("\t") for line in log.splitlines()]
    good = [int(row[2]) / 1e3 for row in rows if row[1] == "200"]
    n_whole = (data_bytes + concurrency * frame_bytes) // frame_bytes
    n_failed = len(rows) - len(good) + max(0, len(good) - int(n_whole))
    return of_latencies(good, seconds=seconds, n_failed=n_failed)


def _number(pattern: str, output: str) -> float:
    match = re.search(pattern, output)
    if match is None:
        raise BenchmarkError(f"h2load: no {pattern} in its output:\n{output}")
    return float(match[1])


def grpc_stream(address: str, workload: Workload, *, concurrency: int, seconds: float) -> LoadResult:
    """Load by `benchmarks.stream_client`, a process of its own: one stream with that many messages in flight."""
    command = [sys.executable, "-m", "benchmarks.stream_client", address, str(concurrency), f"{seconds:g}"]
    output = run_tool(command, seconds, pickle.dumps(workload))
    return msgspec.json.decode(output.splitlines()[-1], type=LoadResult)


def open_loop(address: str, model: str, body: RestBody, *, per_s: float, seconds: float) -> LoadResult:
    """Load by `benchmarks.open_loop`."""
    request = generator.request_bytes(address, f"/v2/models/{model}/infer", body.content, body.headers)
    return generator.load(address, request, generator.poisson(per_s, seconds))
