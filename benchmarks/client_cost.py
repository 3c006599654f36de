"""``python -m benchmarks.client_cost``: CPU time per call of our client and of tritonclient, in pairs that alternate.

The server is a process of its own that echoes, so that the client's process has the client's work only. One row of 30 numbers a
call (breast-cancer), and a frame of 100 rows and seven columns (penguins).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio

from benchmarks.machine import this_machine
from benchmarks.report import table
from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.rest.server import RestFace
from proxy.service import ProxyService
from splitserve import AsyncClient, Client
from splitserve.oip.messages import ServerMetadata
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, serving, signature

N_AT_ONCE = 16
"""Calls in flight of the async clients."""

CELLS = TensorSpec("features", "FP32", ("batch", 30))
COLUMNS = {
    "island": "BYTES", "bill_length_mm": "FP64", "bill_depth_mm": "FP64", "flipper_length_mm": "FP64", "body_mass_g": "FP64",
    "sex": "BYTES", "year": "INT64",
}  # fmt: skip
ROW = np.zeros((1, 30), np.float32)
FRAME = pd.DataFrame(
    {name: ["Dream" if kind == "BYTES" else 2009.0 if kind == "FP64" else 2009] * 100 for name, kind in COLUMNS.items()}
)


class Figure(NamedTuple):
    """CPU microseconds per call, medians of all pairs."""

    name: str
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


async def serve() -> None:
    """Echo until standard input ends."""
    penguins = signature("penguins", [TensorSpec(name, kind, ("batch", 1)) for name, kind in COLUMNS.items()], version="1.1")
    backend = FakeInference(signature("breast-cancer", [CELLS], version="1.1"), penguins)
    service = ProxyService(backend)
    await service.refresh()
    config = RestConfig(metadata=ServerMetadata("benchmark", "0", ("binary_tensor_data",)), default_timeout_s=30)
    async with RestFace(RestApp(service, config)) as face, serving(backend, stage="proxy") as address:
        print(face.port, address.rpartition(":")[2], flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the log: nobody reads it
        await asyncio.to_thread(sys.stdin.read)


@contextlib.contextmanager
def server() -> Iterator[tuple[str, str]]:
    """The addresses of an echo, over REST and gRPC."""
    command = [sys.executable, "-m", "benchmarks.client_cost", "--serve"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        for line in process.stdout:
            if line.split()[0].isdecimal():
                rest, grpc = line.split()
                break
        yield f"127.0.0.1:{rest}", f"127.0.0.1:{grpc}"
        process.stdin.close()


def cpu_us(call: Callable[[], Any], n_calls: int) -> float:
    """CPU time per call, all threads of this process."""
    began = time.process_time()
    for _ in range(n_calls):
        call()
    return (time.process_time() - began) / n_calls * 1e6


async def cpu_us_async(call: Callable[[], Awaitable[Any]], n_calls: int) -> float:
    """CPU time per call, with `N_AT_ONCE` in flight."""

    async def work() -> None:
        for _ in range(n_calls // N_AT_ONCE):
            await call()

    began = time.process_time()
    await asyncio.gather(*(work() for _ in range(N_AT_ONCE)))
    return (time.process_time() - began) / (n_calls // N_AT_ONCE * N_AT_ONCE) * 1e6


def cells(module: Any) -> list[Any]:
    """The input of tritonclient, one row, made for each call, as ours is."""
    made = module.InferInput("features", ROW.shape, "FP32")
    made.set_data_from_numpy(ROW)
    return [made]


def columns(module: Any) -> list[Any]:
    """The inputs of tritonclient for a frame."""
    inputs = []
    for name, kind in COLUMNS.items():
        values = FRAME[name].to_numpy(dtype=object if kind == "BYTES" else None).reshape(-1, 1)
        made = module.InferInput(name, values.shape, kind)
        made.set_data_from_numpy(np.char.encode(values.astype(str)).astype(object) if kind == "BYTES" else values)
        inputs.append(made)
    return inputs


def sync_figures(rest: str, grpc: str, n_pairs: int, n_calls: int) -> list[Figure]:
    """One call after the other."""
    with (
        Client(f"http://{rest}") as ours_rest,
        Client(grpc) as ours_grpc,
        tritonclient.http.InferenceServerClient(rest) as theirs_rest,
        tritonclient.grpc.InferenceServerClient(grpc) as theirs_grpc,
    ):
        kinds: list[tuple[str, Any, Any, Any]] = [
            ("REST", ours_rest, theirs_rest, tritonclient.http),
            ("gRPC", ours_grpc, theirs_grpc, tritonclient.grpc),
        ]
        figures = []
        for name, ours, theirs, module in kinds:
            pairs = paired(partial(our_row, ours), partial(their_row, theirs, module), n_pairs, n_calls)
            figures.append(Figure(f"{name}, one row", *pairs))
            pairs = paired(partial(our_frame, ours), partial(their_frame, theirs, module), n_pairs, max(n_calls // 10, 1))
            figures.append(Figure(f"{name}, frame", *pairs))
        return figures


def our_row(client: Client) -> Any:
    return client.infer("breast-cancer", ROW)["features"]


def their_row(client: Any, module: Any) -> Any:
    return client.infer("breast-cancer", cells(module)).as_numpy("features")


def our_frame(client: Client) -> Any:
    return client.infer("penguins", FRAME).to_frame()


def their_frame(client: Any, module: Any) -> Any:
    return frame_of(client.infer("penguins", columns(module)))


def frame_of(answer: Any) -> pd.DataFrame:
    """A frame, as ours is."""
    found = {name: answer.as_numpy(name).ravel() for name in COLUMNS}
    return pd.DataFrame(
        {name: np.char.decode(each.astype(bytes)) if each.dtype == object else each for name, each in found.items()}
    )


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], n_pairs: int, n_calls: int) -> tuple[float, float]:
    """Medians of both, measured alternately."""
    cpu_us(ours, 10), cpu_us(theirs, 10)
    pairs = [(cpu_us(ours, n_calls), cpu_us(theirs, n_calls)) for _ in range(n_pairs)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


async def async_figures(rest: str, grpc: str, n_pairs: int, n_calls: int) -> list[Figure]:
    """`N_AT_ONCE` calls at a time."""
    async with (
        AsyncClient(f"http://{rest}") as ours_rest,
        AsyncClient(grpc) as ours_grpc,
        tritonclient.http.aio.InferenceServerClient(rest, conn_limit=N_AT_ONCE) as theirs_rest,
        tritonclient.grpc.aio.InferenceServerClient(grpc) as theirs_grpc,
    ):
        kinds: list[tuple[str, Any, Any, Any]] = [
            ("REST, one row, asyncio", ours_rest, theirs_rest, tritonclient.http),
            ("gRPC, one row, asyncio", ours_grpc, theirs_grpc, tritonclient.grpc),
        ]
        figures = []
        for name, ours, theirs, module in kinds:

            async def call_ours(ours: Any = ours) -> Any:
                return (await ours.infer("breast-cancer", ROW))["features"]

            async def call_theirs(theirs: Any = theirs, module: Any = module) -> Any:
                return (await theirs.infer("breast-cancer", cells(module))).as_numpy("features")

            for call in (call_ours, call_theirs):
                await cpu_us_async(call, N_AT_ONCE)
            pairs = [(await cpu_us_async(call_ours, n_calls), await cpu_us_async(call_theirs, n_calls)) for _ in range(n_pairs)]
            figures.append(Figure(name, statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)))
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client_cost", description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--calls", type=int, default=400, help="of each measurement")
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return
    with server() as (rest, grpc):
        figures = sync_figures(rest, grpc, arguments.pairs, arguments.calls)
        figures += asyncio.run(async_figures(rest, grpc, arguments.pairs, arguments.calls))
    print(this_machine())
    header = ("call", "splitserve, CPU µs", "tritonclient, CPU µs", "ratio")
    print(table(header, [(each.name, f"{each.ours:.0f}", f"{each.theirs:.0f}", f"{each.ratio:.2f}") for each in figures]))


if __name__ == "__main__":
    main()
