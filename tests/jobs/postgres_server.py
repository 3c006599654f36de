"""A PostgreSQL server of a test, on a free port of loopback: Debian's package, started by hand and stopped by its process id."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.processes import free_ports

BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/lib/postgresql/bin"))


class PostgresServer:
    """A server with its own folder. It can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "database"
        self._log = folder / "log"
        (self.port,) = free_ports(1)
        self._run("initdb", "-D", self._folder, "-U", "postgres", "-A", "trust", "--no-sync")

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=100"
        self._run("pg_ctl", "-D", self._folder, "-l", self._log, "-w", "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-D", self._folder, "-m", mode, "-w", "stop")

    def sql(self, statement: str) -> str:
        """Run a statement as the superuser."""
        command = [BINARIES / "psql", "-X", "-q", "-t", "-A", "-d", self.url, "-c", statement]
        environment = {**os.environ, "PGOPTIONS": "-c default_transaction_read_only=off"}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    def _run(self, program: str, *arguments: object) -> None:
        """As the user postgres: the server refuses to run as root."""
        command = [str(BINARIES / program), *map(str, arguments)]
        if os.getuid() == 0:
            command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A running server. Its folder is not one of pytest's, which are closed to the user postgres."""
    with tempfile.TemporaryDirectory(prefix="splitserve-postgres-") as folder:
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        server = PostgresServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
