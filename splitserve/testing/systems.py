"""A user's own pipeline or model repository, served as in production: all services in one process, on free ports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from splitserve.client import Client
from splitserve.needed import needed

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
POLL_INTERVAL_S = 0.05
_OWN_SETTINGS = ("JOBS_", "PROXY_", "PREPROCESS_", "PREDICT_", "MODEL_")
_N_LINES = 20
_PACKAGES = '"splitserve[publish,proxy,preprocess,predict]"'


class NotServed(Exception):
    """The services did not start; with their last log lines."""


class ServedClient(Client):
    """A client of a system that `serve` has started."""

    rest_url: str
    grpc_url: str
    repository: str
    """The model repository that it serves."""


@contextmanager
def serve(
    what: Any,
    X: Any = None,
    *,
    name: str = "model",
    over: Literal["rest", "grpc"] = "rest",
    environment: dict[str, str] | None = None,
    publish_options: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[ServedClient]:
    """Publish a fitted pipeline and serve it, or serve what a model repository has.

    Example::

        with splitserve.testing.serve(pipeline, X) as client:
            assert client.infer("model", X[:5])["label"].tolist() == pipeline.predict(X[:5]).tolist()

    Args:
        what: a fitted pipeline, or the path of a model repository.
        X: rows that the pipeline was fitted on, as for `splitserve.publish`.
        name: of the published model.
        over: the protocol of the client; both are served, at ``client.rest_url`` and ``client.grpc_url``.
        environment: settings of the services (docs/settings.md).
        publish_options: further arguments of `splitserve.publish`.
        options: further arguments of the client.

    Raises:
        ModuleNotFoundError: packages of publishing are not installed; says how to install them.
        PublishError: the pipeline cannot be published.
        NotServed: the services do not start.
    """
    with ExitStack() as stack:
        if isinstance(what, str | os.PathLike):
            repository = os.fspath(what)
        else:
            with needed("splitserve.testing.serve", _PACKAGES):
                from splitserve.publishing import publish

            repository = stack.enter_context(TemporaryDirectory(prefix="splitserve-"))
            publish(what, X, name=name, repository=repository, **(publish_options or {}))
        ports = stack.enter_context(_running(repository, environment or {}))
        urls = {"rest": f"http://127.0.0.1:{ports['http_port']}", "grpc": f"grpc://127.0.0.1:{ports['grpc_port']}"}
        client = stack.enter_context(ServedClient(urls[over], **options))
        client.rest_url, client.grpc_url, client.repository = urls["rest"], urls["grpc"], repository
        yield client


@contextmanager
def _running(repository: str, environment: dict[str, str]) -> Iterator[dict[str, int]]:
    """The fused service in a process of its own; its ports, once its models are ready."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OWN_SETTINGS)}
    settings = {"MODEL_REPOSITORY": str(Path(repository).resolve()), "LOG_FORMAT": "json"}
    settings |= {"PROXY_HTTP_PORT": "0", "PROXY_GRPC_PORT": "0", "PROXY_ADMIN_PORT": "off", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "fused_service"],
        env={**inherited, **settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = _Log(process)
    try:
        yield log.wait_until_ready()
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


class _Log:
    """Reads what the services write, so that they never wait for a reader."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: list[str] = []
        self._ports: dict[str, int] = {}
        self._is_decided = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> dict[str, int]:
        """The ports of the services.

        Raises:
            NotServed: they end, or are not ready in time.
        """
        end = time.monotonic() + START_TIMEOUT_S
        self._is_decided.wait(START_TIMEOUT_S)
        if not self._ports:
            raise self.failure("they did not start")
        with Client(f"http://127.0.0.1:{self._ports['http_port']}") as client:
            while not client.is_ready():
                if self._process.poll() is not None or time.monotonic() > end:
                    raise self.failure("they are not ready")
                time.sleep(POLL_INTERVAL_S)
        return self._ports

    def failure(self, what: str) -> NotServed:
        """The error, with what they wrote last."""
        lines = "\n".join(self._lines[-_N_LINES:])
        lacks = any(line.startswith("ModuleNotFoundError") for line in self._lines)
        way_out = f" since packages are not installed: pip install {_PACKAGES}" if lacks else ""
        return NotServed(f"the services cannot be used: {what}{way_out}; their last log lines:\n{lines}")

    def close(self) -> None:
        """Wait for the end of the log."""
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.append(line.rstrip())
                if '"listening"' in line and "http_port" in line:
                    entry = json.loads(line)
                    self._ports = {key: entry[key] for key in ("http_port", "grpc_port")}
                    self._is_decided.set()
        self._is_decided.set()
