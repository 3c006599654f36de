"""What only the store in PostgreSQL has: replicas, restarts of the database, announcements."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psycopg
import pytest
import structlog.testing

from splitserve.errors import Internal, SplitserveError, Unavailable
from splitserve.jobs import postgres as postgres_module
from splitserve.jobs.postgres import PostgresStore
from splitserve.jobs.records import Finish, NewJob, Payload, new_id
from tests.jobs.postgres_server import PostgresServer
from tests.jobs.whole import until

pytestmark = pytest.mark.postgres
HOUR = 3600.0


def job(**options: object) -> NewJob:
    defaults = {"model": "penguins"}
    return NewJob(id=new_id(), owner="ann", version="1.1", request=Payload(b"rows"), **{**defaults, **options})


@pytest.fixture
async def store(postgres: PostgresServer) -> AsyncIterator[PostgresStore]:
    postgres.sql("DROP SCHEMA IF EXISTS splitserve_jobs CASCADE")
    async with PostgresStore(postgres.url) as store:
        yield store


async def until_it_works(call):
    """The result of a call that fails as long as the database is away."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.05)


async def test_replicas_migrate_once(postgres):
    """They start at the same time, on an empty database."""
    postgres.sql("DROP SCHEMA IF EXISTS splitserve_jobs CASCADE")
    stores = [PostgresStore(postgres.url) for _ in range(4)]

    for store in stores:
        await store.__aenter__()
    answers = await asyncio.gather(*[store.submit(job()) for store in stores])
    for store in stores:
        await store.close()

    assert all(answer.is_new for answer in answers)
    assert postgres.sql("SELECT count(*) FROM splitserve_jobs.migrations") == "1"


async def test_a_restart_of_the_database_loses_nothing(postgres, store):
    """Calls meanwhile are told to come back; the pool recovers by itself."""
    before = (await store.submit(job())).job
    (claimed,) = await store.claim("w1", 1, HOUR)

    postgres.stop("immediate")
    with pytest.raises(Unavailable) as refused:
        await store.submit(job())
    postgres.start()

    after = await until_it_works(lambda: store.submit(job()))
    assert after.is_new
    assert "unknown" not in refused.value.message  # nothing was sent
    assert await store.finish([Finish(claimed.lease, Payload(b"answer"))]) == [True]
    assert (await store.get("ann", before.id)).status == "succeeded"


async def test_a_database_that_is_read_only_is_one_that_is_away(postgres, store):
    """After a failover connections lead to what is no longer the primary: they are dropped."""
    await store.submit(job())
    postgres.sql("ALTER DATABASE postgres SET default_transaction_read_only = on")
    postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'splitserve-jobs'")
    try:
        with pytest.raises(Unavailable):
            await store.submit(job())
    finally:
        postgres.sql("ALTER DATABASE postgres RESET default_transaction_read_only")

    assert (await until_it_works(lambda: store.submit(job()))).is_new


@pytest.mark.parametrize(("encoding", "is_usable"), [("UTF8", True), ("SQL_ASCII", True), ("LATIN1", False)])
async def test_text_is_text_in_every_encoding_of_the_database(postgres, encoding, is_usable):
    """Any name has to fit into it; another one is refused, and the log says which."""
    name = f"db_{encoding.lower()}"
    postgres.sql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'")
    new = job(model="\N{SNOWMAN}")
    with structlog.testing.capture_logs() as logs:
        async with PostgresStore(postgres.url.removesuffix("postgres") + name) as store:
            if is_usable:
                await store.submit(new)
                (claimed,) = await store.claim("w1", 1, HOUR)
                assert (claimed.lease.id, claimed.model) == (new.id, new.model)
            else:
                with pytest.raises(Unavailable):
                    await store.submit(new)

    reasons = [entry["reason"] for entry in logs if entry.get("code") == "encoding"]
    assert set(reasons) == (set() if is_usable else {"the database has encoding LATIN1, expected UTF8"})


class Network:
    """Between the store and the database. Once it is broken it delivers nothing, and tells nobody."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._writers: list[asyncio.StreamWriter] = []

    def break_(self) -> None:
        self._is_whole.clear()

    @contextlib.asynccontextmanager
    async def url(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        async with server:
            yield f"postgresql://postgres@127.0.0.1:{server.sockets[0].getsockname()[1]}/postgres"
            self._is_whole.set()
            for writer in self._writers:
                writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, requests]
        await asyncio.gather(self._deliver(reader, requests), self._deliver(answers, writer))

    async def _deliver(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                await self._is_whole.wait()
                writer.write(data)
        writer.close()


async def test_a_broken_network_holds_up_no_call_and_no_end_for_ever(postgres, monkeypatch):
    """Nothing reports it: a call that waits for its answer ends, the next one too, and so does the store with one in flight."""
    for name in ("CALL_TIMEOUT_S", "CHECK_TIMEOUT_S", "CONNECT_TIMEOUT_S"):
        monkeypatch.setattr(postgres_module, name, 1)
    network = Network(postgres.port)
    async with asyncio.timeout(60), network.url() as url:
        store = PostgresStore(url)
        await store.__aenter__()
        await store.submit(job())
        async with await psycopg.AsyncConnection.connect(postgres.url) as other:
            await other.execute("LOCK TABLE splitserve_jobs.jobs")
            waiting = asyncio.create_task(store.list_jobs("ann"))
            locks = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            while (await (await other.execute(locks)).fetchone())[0] == 0:
                pass
            network.break_()
            with pytest.raises(Unavailable):
                await waiting
        with pytest.raises(Unavailable):
            await store.list_jobs("ann")
        last = asyncio.create_task(store.list_jobs("ann"))
        await asyncio.sleep(0)
        await store.close()
        with pytest.raises(Unavailable):
            await last


async def test_a_job_whose_commit_was_cut_off_is_looked_up(store, monkeypatch):
    """The answer to the COMMIT is lost: the caller is told of the job that was stored, and does not submit another."""
    commit = psycopg.AsyncConnection.commit
    cut = [True]

    async def committed_and_cut_off(self):
        await commit(self)
        if cut.pop() if cut else False:
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(psycopg.AsyncConnection, "commit", committed_and_cut_off)
    new = job()

    submitted = await store.submit(new)

    assert submitted.job.id == new.id
    assert len(await store.list_jobs("ann")) == 1


async def test_a_job_of_which_nothing_is_known_is_named(postgres, store, monkeypatch):
    """The connection was lost in the COMMIT, and the database with it. The error has the id, and says how to submit again."""
    await store.submit(job())
    new = job()

    async def stopped(self):
        await asyncio.to_thread(postgres.stop, "immediate")
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(psycopg.AsyncConnection, "commit", stopped)
    try:
        with pytest.raises(Unavailable, match=f"job {new.id}.*Idempotency-Key"):
            await store.submit(new)
    finally:
        postgres.start()


@pytest.mark.parametrize("is_pooled", [False, True], ids=["direct", "pooled"])
async def test_announcements_reach_other_replicas(postgres, pooler, is_pooled):
    """So that a worker, or a caller that waits, need not poll; behind a pooler by the direct URL."""
    heard = asyncio.Event()
    url = pooler if is_pooled else postgres.url
    store, other = (PostgresStore(url, direct_url=postgres.url) for _ in range(2))
    other.announce = lambda: None
    other.on_announcement(heard.set)
    async with store, other, asyncio.timeout(30):
        await heard.wait()  # it listens now
        heard.clear()
        store.announce()
        await heard.wait()


async def test_listening_through_a_pooler_is_reported(pooler, monkeypatch):
    """It accepts LISTEN and delivers nothing; the log names the setting."""
    monkeypatch.setattr(postgres_module, "LISTENING_TIMEOUT_S", 0.2)
    with structlog.testing.capture_logs() as logs:
        async with PostgresStore(pooler):
            await until(lambda: any(entry["event"] == "announcements not received" for entry in logs))


async def test_submits_send_no_notify(postgres, store):
    """Each NOTIFY takes a lock that all commits share; a name of any length fits."""
    await store.submit(job(model="\N{SNOWMAN}" * 4000))

    assert postgres.sql("SELECT count(*) FROM pg_trigger WHERE tgname LIKE '%notif%'") == "0"


async def test_claims_never_take_more_than_asked_for(postgres, store):
    """Whatever the plan: statistics say that the table is empty."""
    await store.submit(job())
    postgres.sql("ANALYZE splitserve_jobs.jobs")
    await asyncio.gather(*[store.submit(job()) for _ in range(200)])

    claimed = [await store.claim("w1", 1, HOUR) for _ in range(50)]

    assert [len(each) for each in claimed] == [1] * 50


async def test_a_row_that_cannot_be_read_is_an_internal_error(postgres, store):
    """It was changed by hand. Whoever asks goes on; other jobs are read."""
    broken, whole = (await store.submit(job())).job, (await store.submit(job())).job
    postgres.sql(f"UPDATE splitserve_jobs.jobs SET error = 'x' WHERE id = '{broken.id}'")

    with pytest.raises(Internal):
        await store.get("ann", broken.id)

    assert await store.get("ann", whole.id) == whole


async def test_no_call_keeps_a_transaction_open(postgres, store):
    """An old snapshot would keep dead rows, and claims would get slower and slower."""
    await store.submit(job())
    await store.state()

    assert postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == "0"


async def test_an_error_of_the_caller_leaves_nothing_behind(store):
    """It is raised within the transaction, which is rolled back."""
    await store.submit(job(key="k", fingerprint=b"1"))

    with pytest.raises(SplitserveError):
        await store.submit(job(key="k", fingerprint=b"2"))

    assert len(await store.list_jobs("ann")) == 1
