"""The stores: every test with the fixture ``open_store`` runs on each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from splitserve.jobs.records import StoreRules
from splitserve.jobs.sqlite import SqliteStore
from splitserve.jobs.store import JobStore
from tests.jobs.postgres_server import PostgresServer, pgbouncer, postgres_server

OpenStore = Callable[..., Awaitable[JobStore]]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for all tests of a run."""
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def pooler(postgres: PostgresServer) -> Iterator[str]:
    """The URL of pgbouncer in front of the server."""
    with pgbouncer(postgres) as url:
        yield url


@pytest.fixture(params=["sqlite", *(pytest.param(name, marks=pytest.mark.postgres) for name in ("postgres", "pgbouncer"))])
async def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OpenStore]:
    """Opens an empty store with the rules that it is given. A second call opens the same data again, with PostgreSQL as another
    replica, with SQLite as the next process."""
    stores: list[JobStore] = []

    async def open_sqlite(**rules: float) -> JobStore:
        for store in stores:
            await store.close()
        store = SqliteStore(tmp_path / "jobs", StoreRules(**rules))
        store.open()
        stores.append(store)
        return store

    async def open_postgres(**rules: float) -> JobStore:
        from splitserve.jobs.postgres import PostgresStore

        store = PostgresStore(url, StoreRules(**rules), direct_url=server.url)
        await store.__aenter__()
        stores.append(store)
        return store

    if request.param != "sqlite":
        server: PostgresServer = request.getfixturevalue("postgres")
        url: str = request.getfixturevalue("pooler") if request.param == "pgbouncer" else server.url
        server.sql("DROP SCHEMA IF EXISTS splitserve_jobs CASCADE")
    yield open_sqlite if request.param == "sqlite" else open_postgres
    for store in stores:
        await store.close()
