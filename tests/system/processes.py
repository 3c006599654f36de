"""Service processes for tests: started on free ports, watched through their logs, stopped by signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.system.fork_server import Forked, fork_server

PATIENCE_S = 60.0

NO_ADMIN = {f"{service}_ADMIN_PORT": "off" for service in ("PROXY", "PREPROCESS", "PREDICT", "JOBS")}
"""Services of several tests run at a time, so that the usual ports are taken."""

UNRELEASED = {"PREPROCESS_ALLOW_UNRELEASED_PAIRS": "true", "PREDICT_ALLOW_UNRELEASED_PAIRS": "true"}
"""For tests of halves that are not proven as a whole."""


def free_ports(n_ports: int) -> list[int]:
    """Free ports, for programs that cannot report the port that they bound."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n_ports)]
        return [each.getsockname()[1] for each in sockets]


def wait_until(claim: Callable[[], Any], what: str, *, patience_s: float = PATIENCE_S) -> Any:
    """The first true value of ``claim``; fails after a while, saying ``what`` did not come."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if value := claim():
            return value
        threading.Event().wait(0.02)
    raise AssertionError(f"waited {patience_s} s in vain: {what}")


class Process:
    """One service process and the log lines that it has written so far.

    Args:
        module: what runs.
        environment: settings, in addition to what this process has.
        python: the interpreter; "": this one, in a process that is forked with all imports made, see `tests.system.fork_server`.
        arguments: of the command line.
    """

    def __init__(
        self, module: str, environment: Mapping[str, str], python: str | Path = "", arguments: Sequence[str] = ()
    ) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PROXY_", "PRE", "MODEL_"))}
        whole = {**inherited, **NO_ADMIN, "LOG_FORMAT": "json", **environment}
        self.lines: list[str] = []
        ours, theirs = os.pipe()
        self._process: subprocess.Popen[bytes] | Forked
        if not python and fork_server().can_start(whole):
            self._process = fork_server().start(module, arguments, whole, theirs)
        else:
            command = [python or sys.executable, "-m", module, *arguments]
            self._process = subprocess.Popen(command, env=whole, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, output: int) -> None:
        with open(output) as lines:
            for line in lines:
                self.lines.append(line.rstrip())

    @property
    def pid(self) -> int:
        return self._process.pid

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines with this event, as dicts."""
        parsed = [json.loads(line) for line in self.lines if line.startswith("{") and name in line]
        return [line for line in parsed if line.get("event") == name]

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first log line with this event; fails if the process ends without it."""

        def look() -> Any:
            found = self.events(event)
            if not found and self._process.poll() is not None:
                raise AssertionError("\n".join(["the process ended:", *self.lines]))
            return found

        return wait_until(look, f'event "{event}"')[0]

    def signal(self, number: int = signal.SIGTERM) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit status."""
        code = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def stop(self) -> int:
        """Ask it to stop and wait; kills it if it does not."""
        if self._process.poll() is None:
            self.signal()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def rss_mb(self) -> float:
        """Resident memory, in MiB."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def cpu_s(self) -> float:
        """CPU seconds that the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class System:
    """Predict, preprocess and proxy, or all in one, on free ports; ``predict`` is the address of another server in its place."""

    def __init__(self, models: Path | str, *, is_fused: bool = False, predict: str = "", **environment: str) -> None:
        self._environment = {"MODEL_REPOSITORY": str(models), **environment}
        self.processes: dict[str, Process] = {}
        if is_fused:
            self._start_edge("fused", "fused_service")
            return
        self.predict = predict or self.start_predict()
        self.processes["preprocess"] = Process(
            "preprocess_service",
            {
                **self._environment,
                "PREPROCESS_GRPC_PORT": "0",
                "PREPROCESS_PREDICT_TARGET": self.predict,
                "PREPROCESS_REFRESH_INTERVAL_S": "0.1",
            },
        )
        self.preprocess = f"127.0.0.1:{self.processes['preprocess'].wait_for('listening')['grpc_port']}"
        self._start_edge("proxy", "proxy", PROXY_PREPROCESS_TARGET=self.preprocess)

    def start_predict(self, port: int = 0) -> str:
        """Start predict and give its address; again after it was stopped, on the port it had."""
        self.processes["predict"] = Process("predict_service", {**self._environment, "PREDICT_GRPC_PORT": str(port)})
        return f"127.0.0.1:{self.processes['predict'].wait_for('listening')['grpc_port']}"

    def _start_edge(self, name: str, module: str, **environment: str) -> None:
        settings = {"PROXY_HTTP_PORT": "0", "PROXY_GRPC_PORT": "0", "PROXY_REFRESH_INTERVAL_S": "0.1"}
        self.processes[name] = Process(module, {**self._environment, **settings, **environment})
        ports = self.processes[name].wait_for("listening")
        self.http = f"127.0.0.1:{ports['http_port']}"
        self.grpc = f"127.0.0.1:{ports['grpc_port']}"

    def wait_until_settled(self) -> System:
        """Until nothing is being loaded any more: every model of the repository is ready or refused."""

        def is_settled() -> bool:
            names = {path.name for path in Path(self._environment["MODEL_REPOSITORY"]).iterdir()}
            known = set(self.rest("/v2/models")[1].get("models", ()))
            return names <= known and all(
                "loading" not in str(self.rest(f"/v2/models/{name}/ready")[1].get("error", "")) for name in names
            )

        wait_until(is_settled, "all models loaded or refused")
        return self

    def rest(self, path: str, content: Any = None) -> tuple[int, Any]:
        """Status and JSON of a GET, or of a POST of ``content`` as JSON."""
        body = None if content is None else json.dumps(content).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(f"http://{self.http}{path}", body), timeout=PATIENCE_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stop(self) -> dict[str, int]:
        """Stop all, the edge first; exit status by name."""
        return {name: process.stop() for name, process in reversed(self.processes.items())}
