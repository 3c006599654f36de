"""MLflow's own tracking server for tests, started by its command on a free port."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.processes import free_ports, wait_until


@contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """A server with its database and the artifacts that it proxies in a folder; its URL. Stopped at the end."""
    (port,) = free_ports(1)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "artifacts")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment = {**inherited, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: _is_up(url) or process.poll() is not None, "the tracking server", patience_s=300)
            assert process.poll() is None, log.read_text()
            yield url
        finally:
            process.terminate()
            process.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health") as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False
