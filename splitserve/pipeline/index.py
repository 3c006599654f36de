"""The local index: which steps have finished, with what outputs. Read without importing MLflow.

``<store>/index/<pipeline>/<step>/<digest>.json``   a finished step; written last, atomically
``<store>/runs/<id>.json``                          a run and the states of its steps
``<store>/work/<pipeline>/<step>-<digest>/``        checkpoints and metrics of attempts that may be resumed
``<store>/lock``                                    held by the runner for as long as it lives
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splitserve.pipeline.context import write_durably
from splitserve.pipeline.digests import digest_of_file

RUNNING, FINISHED, FAILED, INTERRUPTED, REUSED, PENDING = "running", "finished", "failed", "interrupted", "reused", "pending"


@dataclass
class Finished:
    """A finished step. ``depends_on`` is what its digest was made of; ``outputs`` has the digest of each file in ``folder``."""

    step: str
    digest: str
    depends_on: dict[str, Any]
    run_id: str
    folder: str
    outputs: dict[str, str]
    metrics: list[dict[str, Any]]
    seconds: float
    finished_at: str

    def problem(self) -> str:
        """Why it cannot be reused: an output that is missing or has other bytes; "" if it can."""
        for path, digest in self.outputs.items():
            file = Path(self.folder) / path
            if not file.is_file():
                return f"output {path} is missing from {self.folder}"
            if (found := digest_of_file(file)) != digest:
                return f"output {path} in {self.folder}: expected SHA-256 {digest[:12]}…, got {found[:12]}…"
        return ""

    def last_metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        return {line["name"]: line["value"] for line in sorted(self.metrics, key=lambda line: line["at"])}


@dataclass
class StepState:
    """A step in a run. ``why`` says why it ran, or what failed."""

    step: str
    state: str = PENDING
    digest: str = ""
    run_id: str = ""
    seconds: float = 0.0
    why: str = ""


@dataclass
class RunState:
    """A run: MLflow's id, the runner's process, and its steps. ``why`` says why it failed or was interrupted.

    ``is_recorded`` is false until MLflow's record says how the run ended.
    """

    id: str
    pipeline: str
    state: str
    pid: int
    host: str
    started_at: str
    parameters: dict[str, Any]
    steps: list[StepState] = field(default_factory=list)
    why: str = ""
    is_recorded: bool = True


class Index:
    """The index in a store's folder."""

    def __init__(self, store: Path, pipeline: str) -> None:
        self.store = store
        self._pipeline = pipeline
        self._finished = store / "index" / pipeline
        self._runs = store / "runs"

    def finished(self, step: str, digest: str) -> Finished | None:
        """The finished step with this digest, if there is one."""
        return _finished(self._finished / step / f"{digest}.json")

    def last(self, step: str) -> Finished | None:
        """The step as it finished last, with whatever digest."""
        files = sorted((self._finished / step).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        return _finished(files[-1]) if files else None

    def finish(self, finished: Finished) -> None:
        """Mark a step as finished: the last write, after which it may be reused."""
        _write(self._finished / finished.step / f"{finished.digest}.json", asdict(finished))

    def forget(self, step: str, digest: str) -> None:
        """The step has to run again."""
        (self._finished / step / f"{digest}.json").unlink(missing_ok=True)

    def scratch(self, step: str, digest: str) -> Path:
        """Where checkpoints of this step with this digest are."""
        return self.store / "work" / self._pipeline / f"{step}-{digest[:32]}"

    def write_run(self, run: RunState) -> None:
        _write(self._runs / f"{run.id}.json", asdict(run))

    def runs(self) -> list[RunState]:
        """The pipeline's runs, oldest first."""
        found = [run for file in self._runs.glob("*.json") if (run := _run(file)) and run.pipeline == self._pipeline]
        return sorted(found, key=lambda run: run.started_at)

    def open_runs(self) -> list[RunState]:
        """Runs that say that they are running, or whose end MLflow has not. With the lock held, their runner is dead."""
        return [run for run in self.runs() if run.state == RUNNING or not run.is_recorded]

    def is_running(self) -> bool:
        """Whether a runner holds the lock."""
        with self._lock_file() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One runner at a time in a store. The kernel releases the lock of a process that ends, however it ends."""
        with self._lock_file() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for the run of process {file.read().strip() or 'unknown'}, which holds {file.name}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
            yield

    @contextmanager
    def _lock_file(self) -> Iterator[Any]:
        self.store.mkdir(parents=True, exist_ok=True)
        path = self.store / "lock"
        path.touch()
        with path.open("r+") as file:
            yield file


def now() -> str:
    """The time of a run's start and of a step's end, in UTC, to the millisecond: runs are ordered by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_durably(path, json.dumps(content, indent=1).encode())


def _finished(path: Path) -> Finished | None:
    try:
        return Finished(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _run(path: Path) -> RunState | None:
    try:
        stored = json.loads(path.read_text())
        return RunState(**{**stored, "steps": [StepState(**step) for step in stored["steps"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return None
