"""PostgreSQL and pgbouncer for tests, on free ports of loopback: Debian's packages, started by hand and stopped by process id."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.processes import free_ports, wait_until

BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/lib/postgresql/bin"))


def unprivileged(*command: object) -> list[str]:
    """A command for the user postgres: the servers refuse to run as root."""
    prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    return [*prefix, *map(str, command)]


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
        command = unprivileged(BINARIES / program, *arguments)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder of the user postgres; those of pytest are closed to it."""
    with tempfile.TemporaryDirectory(prefix="splitserve-postgres-") as folder:
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        yield Path(folder)


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A running server."""
    with open_folder() as folder:
        server = PostgresServer(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")


@contextmanager
def pgbouncer(server: PostgresServer) -> Iterator[str]:
    """The URL of a pooler in transaction mode, with fewer connections than its clients have."""
    (port,) = free_ports(1)
    with open_folder() as folder:
        config = folder / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n"
            f"postgres = host=127.0.0.1 port={server.port} user=postgres\n"
            f"[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\n"
            f"listen_port = {port}\n"
            f"unix_socket_dir =\n"
            f"auth_type = any\n"
            f"pool_mode = transaction\n"
            f"default_pool_size = 3\n"
        )
        log = (folder / "log").open("w")
        process = subprocess.Popen(unprivileged("/usr/sbin/pgbouncer", config), stdout=log, stderr=log, cwd="/")
        try:
            wait_until(lambda: is_listening(port) or process.poll() is not None, "pgbouncer")
            assert process.poll() is None, (folder / "log").read_text()
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            process.kill()
            process.wait()
            log.close()


def is_listening(port: int) -> bool:
    """Whether anything listens on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
