"""The backends of the intermediaries: proxies as deployed, and one stage that they share."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress

from tests.system.processes import Process, free_ports, wait_until


class Stage:
    """The process of `tests.intermediaries.stage`."""

    def __init__(self) -> None:
        self._process = Process("tests.intermediaries.stage", {})
        self.address: str = self._process.wait_for("listening")["grpc"]

    def count(self, ms: int) -> int:
        """How often a row came that asks for so many milliseconds."""
        return sum(line["rows"].count(ms) for line in self._process.events("held"))

    def wait_for(self, ms: int) -> None:
        wait_until(lambda: self.count(ms), f"the row {ms} is held")

    def stop(self) -> None:
        self._process.stop()


class Backend:
    """One ``python -m proxy`` on ports that it keeps over restarts."""

    def __init__(self, stage: str, **environment: str) -> None:
        self.http_port, self.grpc_port = free_ports(2)
        self.environment = {
            "PROXY_HTTP_PORT": str(self.http_port),
            "PROXY_GRPC_PORT": str(self.grpc_port),
            "PROXY_PREPROCESS_TARGET": stage,
            "PROXY_REFRESH_INTERVAL_S": "0.1",
            "PROXY_MAX_QUEUE_WAIT_MS": "0",  # no request is refused on a slow machine
            "LOG_REQUESTS": "all",
            **environment,
        }
        self.start()

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def start(self) -> None:
        """Start, and wait until it can infer."""
        self._process = Process("proxy", self.environment)
        self._process.wait_for("listening")
        wait_until(self._is_ready, "the proxy is ready")

    def drain(self) -> None:
        """Ask it to stop."""
        self._process.signal(signal.SIGTERM)

    def wait(self) -> int:
        """Until it has stopped."""
        return self._process.wait()

    def kill(self) -> None:
        """End it at once, and wait."""
        self._process.signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """Ask it to stop, and wait."""
        return self._process.stop()

    def n_ended(self, status: str) -> int:
        """How many requests for ``hold`` have ended with a status."""
        held = (json.loads(line) for line in self._process.lines if '"hold"' in line and '"infer"' in line)
        return sum(line["status"] == status for line in held)

    def _is_ready(self) -> bool:
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(f"http://{self.http}/v2/health/ready") as answer:
            return bool(answer.status == 200)
        return False


class Pool:
    """Two proxies over one stage."""

    def __init__(self, stage: Stage, **environment: str) -> None:
        self.stage = stage
        self.backends = [Backend(stage.address, **environment) for _ in range(2)]

    def restart_each(self, settle: Callable[[], None]) -> None:
        """A rolling restart: the next one is stopped only once ``settle`` has returned after the one before."""
        for backend in self.backends:
            assert backend.stop() == 0
            backend.start()
            settle()

    def n_ended(self, status: str) -> int:
        """How many requests for ``hold`` have ended with a status."""
        return sum(backend.n_ended(status) for backend in self.backends)

    def stop(self) -> None:
        for backend in self.backends:
            backend.stop()
