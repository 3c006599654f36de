"""Batch scoring: against the libraries alone on the same Parquet, with a bad row in 10,000, and its memory as rows grow.

Whole commands are timed, with their start. Each round runs every command once, so that all share what else the machine does.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import batch_peers, report
from benchmarks.processes import BenchmarkError, _pss_mb, tree
from training.demo import DEMOS, publish_demo

MODELS = ("penguins", "breast-cancer")
ROW_GROUP = 131_072
BAD_EVERY = 10_000
SAMPLE_EVERY_S = 0.2

DIRECT = ("-m", "benchmarks.peers.direct_batch")


class BatchOptions(msgspec.Struct, frozen=True):
    """What is measured: ``rows`` of the comparison with the libraries alone, and the rows at which memory is."""

    rows: int = 1_000_000
    memory_rows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    rounds: int = 3
    peer_rows: int = 0
    """Rows of the comparison with MLServer and MLflow; 0: none."""


class BatchResults(msgspec.Struct, frozen=True):
    """Seconds by model and command, medians; the highest PSS in MB by rows; seconds beside MLServer and MLflow."""

    rows: int
    seconds: dict[str, dict[str, float]]
    pss_mb: dict[str, float]
    peer_rows: int
    peer_seconds: dict[str, float]

    def sections(self) -> dict[str, str]:
        """As tables."""
        lines = []
        for model, commands in self.seconds.items():
            direct = commands["direct"]
            for name, seconds in commands.items():
                lines.append([model, name, f"{seconds:.1f}", f"{self.rows / seconds:.0f}", f"{direct / seconds:.2f}"])
        memory = [[rows, f"{value:.0f}"] for rows, value in self.pss_mb.items()]
        ours = self.peer_seconds.get("splitserve batch", 0.0)
        peers = [
            [name, f"{seconds:.1f}", f"{self.peer_rows / seconds:.0f}", f"{seconds / ours:.1f}"]
            for name, seconds in self.peer_seconds.items()
        ]
        return {
            f"Beside others, {self.peer_rows} rows": report.table(("command", "seconds", "rows/s", "times ours"), peers),
            "Against the libraries alone": report.table(("model", "command", "seconds", "rows/s", "times direct"), lines),
            "Memory": report.table(("rows", "highest PSS, MB"), memory),
        }


def run(options: BatchOptions, scratch: Path) -> BatchResults:
    """Publish, write the rows, measure."""
    repository = scratch / "models"
    for model in MODELS:
        publish_demo(model, str(repository))
    seconds = {model: _compare(model, repository, options, scratch) for model in MODELS}
    pss_mb = {}
    for n_rows in options.memory_rows:
        source = _rows_file("penguins", n_rows, scratch / "memory.parquet")
        pss_mb[str(n_rows)] = _run(_ours("penguins", repository, source, scratch, 1), cores=1)[1]
        print(f"{n_rows} rows: {pss_mb[str(n_rows)]:.0f} MB", flush=True)
    peer_seconds = {}
    if options.peer_rows:
        rows = pq.read_table(_rows_file(MODELS[1], options.peer_rows, scratch / "peers.parquet")).to_pandas()
        peer_seconds = batch_peers.compare(
            rows,
            lambda source: _ours(MODELS[1], repository, source, scratch, 2),
            lambda command: _run(command, cores=2)[0],
            scratch,
        )
    return BatchResults(options.rows, seconds, pss_mb, options.peer_rows, peer_seconds)


def _compare(model: str, repository: Path, options: BatchOptions, scratch: Path) -> dict[str, float]:
    source = _rows_file(model, options.rows, scratch / f"{model}.parquet")
    bad = _rows_file(model, options.rows, scratch / f"{model}-bad.parquet", bad_every=BAD_EVERY)
    commands: dict[str, tuple[Sequence[str], int]] = {
        "direct": ((sys.executable, *DIRECT, str(repository), model, str(source), str(scratch / "direct.parquet")), 1),
        "local, one core": (_ours(model, repository, source, scratch, 1), 1),
        "local, one core, one bad row in 10,000": (_ours(model, repository, bad, scratch, 1), 1),
        "local, two cores": (_ours(model, repository, source, scratch, 2), 2),
    }
    rounds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, (command, cores) in commands.items():
            rounds[name].append(_run(command, cores=cores)[0])
            print(f"{model}, {name}: {rounds[name][-1]:.1f} s", flush=True)
    return {name: statistics.median(values) for name, values in rounds.items()}


def _ours(model: str, repository: Path, source: Path, scratch: Path, workers: int) -> Sequence[str]:
    splitserve = Path(sys.executable).with_name("splitserve")
    command = (str(splitserve), "batch", model, str(source), str(scratch / "ours.parquet"), "--repository", str(repository))
    return (*command, "--workers", str(workers), "--overwrite")


def _rows_file(model: str, n_rows: int, path: Path, bad_every: int = 0) -> Path:
    """The demo's rows again and again, numbers multiplied by a little noise, a row group at a time."""
    rows: Any = DEMOS[model][0]()[1]
    frame = rows if model == "penguins" else pd.DataFrame(rows, columns=[f"features_{i}" for i in range(rows.shape[1])])
    numbers = frame.select_dtypes("number").columns
    frame = frame.astype(dict.fromkeys(numbers, "float64"))
    random = np.random.default_rng(0)
    writer = None
    for begin in range(0, n_rows, ROW_GROUP):
        size = min(ROW_GROUP, n_rows - begin)
        part = frame.iloc[(np.arange(size) + begin) % len(frame)].reset_index(drop=True)
        part[numbers] *= random.normal(1, 0.01, (size, len(numbers)))
        if bad_every:
            part.loc[(part.index + begin) % bad_every == bad_every // 2, numbers[0]] = np.inf
        table = pa.Table.from_pandas(part, preserve_index=False)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return path


def _run(command: Sequence[str], *, cores: int) -> tuple[float, float]:
    """Seconds of a command on so many cores, and the highest PSS of its processes."""
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    if len(chosen) < cores:
        raise BenchmarkError(f"expected {cores} cores, got {len(chosen)}")
    began, highest = time.perf_counter(), 0.0
    is_over = threading.Event()
    cpus = ("taskset", "--cpu-list", ",".join(map(str, chosen)))
    with subprocess.Popen([*cpus, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:

        def watch() -> None:
            nonlocal highest
            while not is_over.wait(SAMPLE_EVERY_S):
                highest = max(highest, sum(_pss_mb(pid) for pid in tree(process.pid)))

        watching = threading.Thread(target=watch)
        watching.start()
        _, said = process.communicate()
        seconds = time.perf_counter() - began
        is_over.set()
        watching.join()
    if process.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed: {said[-2000:]}")
    return seconds, highest
