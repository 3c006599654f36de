"""Starts services for tests by forking a process that has imported what they import, which costs a start two seconds of CPU.

Only the import is shared: a module runs as ``__main__`` in a process of its own, with its own environment, arguments, folder and
output, and ends as any process does. Workers of services are forked after the same imports, too. What differs: a service cannot
miss an import that another one has made, which tests of starts and of images would find.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

SERVICES = ("fused_service", "jobs_service", "predict_service", "preprocess_service", "proxy")

READ_AT_START = ("PYTHON", "OMP_", "OPENBLAS_", "LD_", "MALLOC_", "GRPC_", "LANG", "LC_")
"""Variables with these prefixes are read by the interpreter or by libraries: with others than those of now, a process is new."""

_MAX_REQUEST = 200_000
"""The environment and arguments of a process, in bytes."""


class Forked:
    """A process of the fork server, as a `subprocess.Popen`."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._end = os.pidfd_open(pid)
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self._reaped(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: it has not ended within ``timeout`` s.
        """
        if (status := self._reaped(timeout)) is None:
            raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """None is sent to a process that has ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._end, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _reaped(self, timeout: float | None) -> int | None:
        if self._status is None and select.select([self._end], [], [], timeout)[0]:
            self._status = self._server.reap(self.pid)
            os.close(self._end)
        return self._status


class ForkServer:
    """The process that has imported the services, and a socket to it. It ends when this process does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = subprocess.Popen(  # -P: the modules next to this one would hide others
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._started_with = _read_at_start(os.environ)

    def can_start(self, environment: Mapping[str, str]) -> bool:
        """Whether a process with this environment may be forked."""
        return _read_at_start(environment) == self._started_with

    def start(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], output: int) -> Forked:
        """``python -m MODULE ARGUMENTS``; ``output``: the file descriptor of its stdout and stderr."""
        request = {"module": module, "arguments": list(arguments), "environment": dict(environment), "folder": str(Path.cwd())}
        return Forked(self, self._ask(request, [output]))

    def reap(self, pid: int) -> int:
        """The exit status of a process that has ended."""
        return self._ask({"reap": pid}, [])

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._popen.wait()

    def _ask(self, request: object, files: Sequence[int]) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)
            return int(json.loads(self._socket.recv(100)))


@cache
def fork_server() -> ForkServer:
    """That of this process."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START) and name != "GRPC_ENGINE"}


def _serve(control: socket.socket) -> None:
    """Answer requests until the process that makes them has ended. Returns in what it forks, once that is done."""
    _import_services()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end what they have started
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(control, _MAX_REQUEST, 1)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if pid := request.get("reap"):
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        elif (answer := os.fork()) == 0:
            control.close()
            os.dup2(files[0], 1)
            os.dup2(files[0], 2)
            os.close(files[0])
            _become(request)
            return
        for file in files:
            os.close(file)
        control.send(json.dumps(answer).encode())


def _import_services() -> None:
    for service in SERVICES:
        found = importlib.util.find_spec(f"{service}.__main__")
        assert found is not None
        assert found.loader is not None
        found.loader.exec_module(importlib.util.module_from_spec(found))  # known to nobody: it has not run as __main__
    import uvloop  # noqa: F401  (which they import when they run)


def _become(request: Mapping[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path.insert(0, request["folder"])
    sys.argv = ["", *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
