"""Shards as tasks of a Spark job: one RDD, one partition a shard, one action. The master is that of Spark's own configuration
(``spark-submit``, ``SPARK_CONF_DIR``, ``PYSPARK_SUBMIT_ARGS``), or this machine where there is none.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import uuid
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import msgspec
from pyspark import Broadcast, InheritableThread, SparkConf, SparkContext
from pyspark.accumulators import AccumulatorParam

from splitserve.scoring.engines.outcomes import result_of, score_task
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.shards import OnRows, Shard, ShardResult

POLL_S = 0.2

_LOCAL = {
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",  # the run has its own
}
"""Of a Spark that is started here, where its own configuration says nothing else."""


class SparkEngine:
    """One task a shard.

    Each task adds its outcome to an accumulator, which Spark updates exactly once a task, also if it runs two attempts of one. So
    results are known one by one, of an action that collects nothing. A program that has a context keeps it.

    Args:
        n_workers: cores of a Spark that is started here.
    """

    def __init__(self, n_workers: int) -> None:
        self._n_workers = n_workers

    def run(self, job: bytes, shards: Sequence[Shard], on_rows: OnRows) -> Generator[ShardResult, None, None]:
        """As `Engine.run`."""
        with _context(self._n_workers) as context:
            shared = context.broadcast(job)
            outcomes = context.accumulator([], _Outcomes())
            tasks = context.parallelize([msgspec.json.encode(shard) for shard in shards], max(len(shards), 1))
            action = _Action(context, tasks, shared, outcomes)
            n_seen = 0
            try:
                while n_seen < len(shards):
                    is_over = action.wait(POLL_S)
                    found = outcomes.value[n_seen:]
                    n_seen += len(found)
                    for outcome in found:
                        yield result_of(outcome)
                    if is_over and n_seen < len(shards):
                        raise ScoringError(f"Spark could not score {len(shards) - n_seen} shards: {_said(action.error)}")
            finally:
                action.cancel()
                shared.unpersist()


class _Outcomes(AccumulatorParam):  # type: ignore[misc] # PySpark is not installed where types are checked
    """Outcomes of tasks, in the order in which they end."""

    def zero(self, value: list[bytes]) -> list[bytes]:
        return []

    def addInPlace(self, value1: list[bytes], value2: list[bytes]) -> list[bytes]:  # noqa: N802 - PySpark's name
        value1.extend(value2)
        return value1


class _Action:
    """The job, in a thread of its own."""

    def __init__(self, context: SparkContext, tasks: Any, job: Broadcast[bytes], outcomes: Any) -> None:
        self._context = context
        self._group = f"splitserve-{uuid.uuid4()}"
        self.error: Exception | str = "it has lost their results"

        def score(shard: bytes) -> None:
            outcomes.add([score_task(job.value, shard)])

        def act() -> None:
            context.setJobGroup(self._group, "splitserve batch", interruptOnCancel=False)
            try:
                tasks.foreach(score)
            except Exception as error:  # told by the thread that waits
                self.error = error
            finally:
                self._is_over.set()

        self._is_over = threading.Event()
        self._thread = InheritableThread(target=act, daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over."""
        return self._is_over.wait(timeout_s)

    def cancel(self) -> None:
        """End what still runs."""
        if not self._is_over.is_set():
            self._context.cancelJobGroup(self._group)
        self._thread.join()


def _said(error: Exception | str) -> str:
    """An error without the stack traces of Java: its last line of Python, and Spark's reason."""
    lines = [line.strip(": ") for line in str(error).splitlines() if line.strip() and not line.startswith(("\t", " "))]
    return " ".join(dict.fromkeys([*lines[1:2], *lines[-1:]])) if len(lines) > 1 else str(error)


@contextlib.contextmanager
def _context(n_workers: int) -> Iterator[SparkContext]:
    """Raises:
    ScoringError: Spark cannot be started.
    """
    if SparkContext._active_spark_context is not None:
        yield SparkContext._active_spark_context
        return
    try:
        configuration = (
            SparkConf().setIfMissing("spark.master", f"local[{n_workers}]").setIfMissing("spark.app.name", "splitserve batch")
        )
        if str(configuration.get("spark.master")).startswith("local"):
            for name, value in _LOCAL.items():
                configuration.setIfMissing(name, value)
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else python3 of the PATH
        context = SparkContext(conf=configuration, environment={"TZ": "UTC"})
    except Exception as error:  # of Java, of its absence, or of the master
        raise ScoringError(f"Spark cannot be started or reached: {error}") from error
    try:
        yield context
    finally:
        context.stop()
