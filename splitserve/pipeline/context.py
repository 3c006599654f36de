"""What a step's function gets. Standard library only: a step's environment may have nothing else."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitserve.durable import sync_folder

if TYPE_CHECKING:
    from splitserve.pipeline.record import Record

CHECKPOINTS_KEPT = 2

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


class StepFailed(Exception):
    """A step cannot continue; the message says what, expected, found, and the way out."""


class RecordError(Exception):
    """MLflow, or its artifact store, does not do what it is asked for; the message says which and why."""


def error_message(error: Exception) -> str:
    """An error as a run reports it; of a disk that is full or cannot be written with the way out."""
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        return f"{what}; what has finished is kept, and the same command continues once it can be written"
    return str(error)


@dataclass(frozen=True)
class Call:
    """A call of a step's function. Plain data: a step's own process gets it as JSON.

    Attributes:
        step: its name.
        module: absolute.
        function: its name in the module.
        parameters: values of those that the step declares.
        files: path of each parameter that names a file.
        locked: requirements of the step's lock.
        inputs: folder with copies of the outputs of earlier steps.
        outputs: an empty folder.
        scratch: folder that is kept for the next attempt.
        error: file that gets the message if the step fails in its own process.
        project: a name for what the step starts in docker, the same in each attempt.
        fetched: SHA-256 of each file that a step in a container copies first, by its path in the attempt's folder.
    """

    step: str
    module: str
    function: str
    parameters: dict[str, Any]
    files: dict[str, str]
    locked: list[str]
    inputs: str
    outputs: str
    scratch: str
    error: str
    project: str = ""
    fetched: dict[str, str] = field(default_factory=dict)

    def make(self, context: Context) -> None:
        """Import the function and call it."""
        getattr(importlib.import_module(self.module), self.function)(context)


class Context:
    """One attempt to run one step.

    Attributes:
        step: its name.
        parameters: values of those that it declares.
        outputs: an empty folder; what is in it when the function returns are the step's outputs.
        checkpoints: kept from one attempt to the next of the same digest, and for no other.
        record: MLflow, for a step that runs in the runner; None for others.
        run_id: of the step's MLflow run; "" for others.
        project: a name for what the step starts in docker: what an attempt that was killed has left is found under it.
    """

    def __init__(self, call: Call) -> None:
        self.step, self.parameters, self.outputs = call.step, call.parameters, Path(call.outputs)
        self.checkpoints = Checkpoints(Path(call.scratch, "checkpoints"))
        self.record: Record | None = None
        self.run_id = ""
        self.project = call.project
        self._files, self._inputs = call.files, Path(call.inputs)
        self._metrics = Path(call.scratch, "metrics.jsonl")
        self._shown = 0.0

    def input(self, path: str) -> Path:
        """A file or folder of an earlier step, e.g. ``"data/train.csv"``: a copy.

        Raises:
            StepFailed: there is none, or the step does not declare it.
        """
        found = self._inputs / path
        if not found.exists():
            raise StepFailed(f'input "{path}" does not exist: step "{self.step}" does not declare it, or it was not written')
        return found

    def file(self, parameter: str) -> Path:
        """The file that a parameter names."""
        return Path(self._files[parameter])

    def metric(self, name: str, value: float, *, at: int = 0) -> None:
        """Record a number, e.g. a loss at an epoch.

        Raises:
            StepFailed: it is not finite.
        """
        number = float(value)
        if not math.isfinite(number):
            raise StepFailed(f'metric "{name}" at {at}: expected a finite number, got {number}')
        with self._metrics.open("a") as file:
            file.write(json.dumps({"name": name, "value": number, "at": at, "time": time.time()}) + "\n")

    def forget_metrics(self, *, after: int) -> None:
        """Drop what an interrupted attempt recorded after its last checkpoint, so that each (metric, step) has one value."""
        kept = [line for line in read_metrics(self._metrics) if line["at"] <= after]
        self._metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Report progress: in place on a terminal, at most one line in five seconds elsewhere."""
        is_terminal, now = sys.stdout.isatty(), time.monotonic()
        if done < total and now - self._shown < (0.1 if is_terminal else 5):
            return
        self._shown = now
        filled = 20 * done // max(total, 1)
        text = f"{self.step}: [{'#' * filled}{'.' * (20 - filled)}] {done} of {total} {what}".rstrip()
        print(f"\r{text}\033[K" if is_terminal else text, end="\n" if done >= total or not is_terminal else "", flush=True)

    def fail_unless(self, holds: bool, message: str) -> None:
        """Fail the step with this message unless a condition holds.

        Raises:
            StepFailed: it does not.
        """
        if not holds:
            raise StepFailed(message)


class Checkpoints:
    """Files of one step of one digest: written beside, synced, renamed; the last two are kept; a broken one is skipped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, number: int, content: bytes) -> None:
        """Durable when it returns. ``number`` ascends, e.g. an epoch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(content).hexdigest()
        write_durably(self.folder / f"{number:06d}-{digest}", content)
        for old in self._files()[:-CHECKPOINTS_KEPT]:
            old.unlink()

    def newest(self) -> tuple[int, bytes] | None:
        """The newest whose bytes are those that were written."""
        for file in reversed(self._files()):
            number, _, digest = file.name.partition("-")
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() == digest:
                return int(number), content
            print(f"checkpoint {file} is damaged, using the one before it", flush=True)
        return None

    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.glob("*-*") if not file.name.endswith(".tmp"))


def write_durably(path: Path, content: bytes) -> None:
    """All of it or nothing, also after a power cut: a temporary file beside it, synced, renamed, the folder synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would leave no room for anything else
        raise
    sync_folder(path.parent)


def first_of(names: Sequence[str], n_names: int = 3) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - n_names} more" if len(names) > n_names else ""
    return ", ".join(names[:n_names]) + rest


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a last one that was cut short is left out."""
    return list(_lines(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue
