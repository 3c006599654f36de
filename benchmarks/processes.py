"""Systems under load: started together, watched through ``/proc``, stopped in the reverse order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
OWN_PREFIXES = ("PROXY_", "PREPROCESS_", "PREDICT_", "JOBS_", "MODEL")
"""Variables that would change what is measured: a service gets those that its plan names, and no others."""

_ROOT = Path(__file__).parent.parent
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_N_LINES_SHOWN = 15
_PATIENCE_S = 30.0


class BenchmarkError(Exception):
    """A run that cannot go on: something is missing, does not start, or answers wrongly."""


def run_tool(command: Sequence[str], seconds: float = 0.0, stdin: bytes = b"") -> bytes:
    """What a program prints that is expected to take so long.

    Raises:
        BenchmarkError: it failed, or did not end.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=seconds + _PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{command[0]} did not end within {_PATIENCE_S:.0f} s after its load") from None
    if done.returncode:
        output = (done.stderr or done.stdout).decode(errors="replace")
        raise BenchmarkError(f"{' '.join(command[:3])} failed with status {done.returncode}: {output}")
    return done.stdout


class StageProcess(NamedTuple):
    """One process to start."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]


class SystemSpec(NamedTuple):
    """What is started, and where it then listens: ``host:port``, ``grpc`` empty where there is none."""

    name: str
    stages: tuple[StageProcess, ...]
    http: str
    grpc: str


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RunningSystem:
    """The processes of a plan, running while entered.

    Args:
        plan: what to start.
        logs: folder that gets a file for each stage's output.
    """

    def __init__(self, plan: SystemSpec, logs: Path) -> None:
        self.name = plan.name
        self.http = plan.http
        self.grpc = plan.grpc
        self.started = 0.0
        self.warm: set[tuple[str, str]] = set()
        """Models and protocols that have been under load."""
        self._plan = plan
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> RunningSystem:
        self.started = time.monotonic()
        for stage in self._plan.stages:
            self._start(stage)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _start(self, stage: StageProcess) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OWN_PREFIXES)}
        output = self._stack.enter_context(self._log(stage.name).open("wb"))
        # A session of its own, so that its children can be ended with it.
        process = subprocess.Popen(
            stage.command,
            cwd=_ROOT,
            env={**inherited, **stage.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes[stage.name] = process
        self._stack.callback(_stop, process)

    def _log(self, stage: str) -> Path:
        return self._logs / f"{self.name.replace(' ', '-')}-{stage}.log"

    def wait_until(self, claim: Callable[[], bool], what: str) -> float:
        """Seconds from the start until ``claim`` is true.

        Raises:
            BenchmarkError: a process ended, or it took longer than `READY_TIMEOUT_S`.
        """
        while not claim():
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            if ended or time.monotonic() - self.started > READY_TIMEOUT_S:
                why = f"{', '.join(ended)} ended" if ended else f"not within {READY_TIMEOUT_S:.0f} s"
                raise BenchmarkError(f"{self.name}: {what}: {why}\n{self._last_lines(ended or list(self._processes))}")
            time.sleep(0.02)
        return time.monotonic() - self.started

    def _last_lines(self, stages: list[str]) -> str:
        lines = (line for name in stages for line in self._log(name).read_text(errors="replace").splitlines()[-_N_LINES_SHOWN:])
        return "\n".join(f"    {line}" for line in lines)

    def pids(self) -> dict[str, int]:
        """The process of each stage."""
        return {name: process.pid for name, process in self._processes.items()}

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far by each stage: user and system, all threads, all children."""
        return {name: sum(map(_cpu_s, tree(process.pid))) for name, process in self._processes.items()}

    def pss_mb(self) -> dict[str, float]:
        """Memory of each stage now in MB, pages that are shared with other processes counted by their share."""
        return {name: sum(map(_pss_mb, tree(process.pid))) for name, process in self._processes.items()}

    def peak_rss_mb(self) -> dict[str, float]:
        """The most resident memory that each stage has had, in MB; over several processes the sum of each one's most."""
        return {name: sum(map(_peak_rss_mb, tree(process.pid))) for name, process in self._processes.items()}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop it; kill it and its descendants if it does not stop."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tree(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    try:
        children = [
            int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except OSError:  # it has ended in between
        return
    for child in children:
        yield from tree(child)


def _cpu_s(pid: int) -> float:
    """Source: proc(5), ``/proc/pid/stat``: utime and stime are fields 14 and 15."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _pss_mb(pid: int) -> float:
    return _kilobytes(f"/proc/{pid}/smaps_rollup", "Pss:") / 1e3


def _peak_rss_mb(pid: int) -> float:
    return _kilobytes(f"/proc/{pid}/status", "VmHWM:") / 1e3


def _kilobytes(file: str, field: str) -> float:
    """The field's value in units of 1000 bytes; the kernel's "kB" are 1024."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1.024 for line in lines if line.startswith(field)), 0.0)
