"""The built services, started for an evaluation: what clients would get is what is measured."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitserve.checks.verify import verify
from splitserve.client import Answer, Client
from splitserve.errors import SplitserveError
from splitserve.pipeline.context import Context, StepFailed
from splitserve.pipeline.docker import last_lines
from splitserve.pipeline.images import IMAGES_FILE, started_images
from splitserve.repository.sources import source_of

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
_START = "from splitserve.cli import main; main()"  # the command `splitserve` need not be on PATH, and has no `python -m`


@dataclass(frozen=True)
class RunningSystem:
    """A system that is ready; ``clients`` are one for each transport, ``rest`` and ``grpc``."""

    models: Path
    clients: Mapping[str, Client]

    def verify(self, model: str) -> int:
        """Send the golden rows of the release over both transports, as ``splitserve verify`` does.

        Returns:
            How many rows agreed.

        Raises:
            StepFailed: an answer differs from the recorded one, or there is none.
        """
        n_rows = 0
        for transport, client in self.clients.items():
            outcomes = verify(source_of(str(self.models)), client, model)
            if not outcomes:
                raise StepFailed(f"over {transport}, no pair of {model} is ready")
            for outcome in outcomes:
                if outcome.problem:
                    raise StepFailed(f"over {transport}, {model} {outcome.pair}: {outcome.problem}")
                n_rows += outcome.n_rows
        return n_rows


@contextmanager
def running_build(context: Context) -> Iterator[RunningSystem]:
    """What the step ``build`` has made, running: containers of its images if it has made any, else processes.

    Raises:
        StepFailed: it does not start.
    """
    models = context.input("build/models")
    file = models.parent / IMAGES_FILE
    if not file.exists():
        with running(models) as system:
            yield system
        return
    with running_images(json.loads(file.read_text()), models, project=context.project) as system:
        yield system


@contextmanager
def running_images(
    images: Mapping[str, Mapping[str, str]], models: Path, *, project: str, start_timeout_s: float = START_TIMEOUT_S
) -> Iterator[RunningSystem]:
    """Containers of images with models inside, on free ports of this machine; removed at the end.

    Args:
        images: name and digest of the image of each service.
        models: the model repository that is in them.
        project: the name that docker has for the containers.
        start_timeout_s: for all of them.

    Raises:
        StepFailed: they do not start; with their last log lines.
    """
    http, grpc = _free_ports(2)
    with started_images(images, http_port=http, grpc_port=grpc, project=project) as containers, ExitStack() as stack:
        clients = _clients(stack, http, grpc)
        _wait_until_ready(clients, containers.ended, containers.logs, start_timeout_s)
        yield RunningSystem(models, clients)


@contextmanager
def running(models: Path, *, start_timeout_s: float = START_TIMEOUT_S) -> Iterator[RunningSystem]:
    """Predict, preprocess and proxy on free ports of this machine, by ``splitserve up``; stopped at the end.

    They run without jobs. Their log, ``services.log``, is beside the models; its last lines are part of the error if they do not
    start.

    Raises:
        StepFailed: they do not start.
    """
    http, grpc, preprocess, predict = _free_ports(4)
    command = [sys.executable, "-c", _START, "up", "--repository", str(models), "--http-port", str(http)]
    command += ["--grpc-port", str(grpc), "--preprocess-port", str(preprocess), "--predict-port", str(predict)]
    command += ["--no-jobs", "--admin-port", "off"]
    log = models.parent / "services.log"
    ignored = ("JOBS_", "PROXY_", "PREPROCESS_", "PREDICT_", "MODEL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ignored)}
    with log.open("wb") as output, ExitStack() as stack:
        process = subprocess.Popen(
            command, cwd=models.parent, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        stack.callback(_stop, process)
        clients = _clients(stack, http, grpc)

        def ended() -> str:
            return "" if process.poll() is None else f"splitserve up exited with {process.returncode}"

        _wait_until_ready(clients, ended, lambda: last_lines(log.read_text(errors="replace")), start_timeout_s)
        yield RunningSystem(models, clients)


def _clients(stack: ExitStack, http: int, grpc: int) -> dict[str, Client]:
    return {
        "rest": stack.enter_context(closing(Client(f"http://127.0.0.1:{http}"))),
        "grpc": stack.enter_context(closing(Client(f"127.0.0.1:{grpc}"))),
    }


def _wait_until_ready(clients: Mapping[str, Client], ended: Callable[[], str], logs: Callable[[], str], timeout_s: float) -> None:
    """``ended`` says what has ended, if anything has; ``logs`` what the services wrote last."""
    deadline = time.monotonic() + timeout_s
    while not (what := ended()):
        try:
            if all(client.is_ready() for client in clients.values()):
                return
        except SplitserveError:
            pass  # not listening yet
        if time.monotonic() > deadline:
            what = f"not ready after {timeout_s:.0f} s"
            break
        time.sleep(0.2)
    raise StepFailed(f"the services did not start: {what}; their last log lines:\n{logs()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def labels_of(answer: Answer) -> list[str]:
    """The labels of a classifier's answer, as text."""
    return [label.decode() if isinstance(label, bytes) else str(label) for label in answer["label"].reshape(-1)]


def time_requests(client: Client, model: str, rows: Any, n_requests: int, *, input_name: str = "") -> tuple[float, float]:
    """Median and 99th percentile, in milliseconds, of requests of one row, one after the other.

    Args:
        client: of the system.
        model: its name.
        rows: a DataFrame or an array; its rows are sent in turn.
        n_requests: how many.
        input_name: of the only input, for an array.
    """
    taken = []
    for index in range(n_requests):
        start = index % len(rows)
        row = rows.iloc[start : start + 1] if hasattr(rows, "iloc") else rows[start : start + 1]
        began = time.perf_counter()
        client.infer(model, {input_name: row} if input_name else row)
        taken.append((time.perf_counter() - began) * 1000)
    taken.sort()
    return taken[len(taken) // 2], taken[min(len(taken) - 1, len(taken) * 99 // 100)]


def _free_ports(n_ports: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n_ports)]
        return [each.getsockname()[1] for each in sockets]
