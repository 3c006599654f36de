"""The job store in PostgreSQL, for several replicas of the jobs service.

1. Each call is one transaction on a connection of the pool. Workers claim with ``FOR UPDATE SKIP LOCKED`` through materialised
   subqueries, so that no plan locks or takes more rows than asked for.
2. Only the database's clock judges; durations are sent as intervals.
3. A heartbeat updates one row of its worker. Jobs of workers whose heartbeat is late are claimed again.
4. Announcements (NOTIFY) are merged, have no payload, and are sent outside of the transactions of submits; they only save time:
   everything is polled too. LISTEN has a connection of its own, which a pooler in transaction mode must not be in front of.
5. No session state and no prepared statements, so that the other connections may go through such a pooler.
6. If the connection is lost during a COMMIT, the job is looked up; if that is impossible too, the error names its id.

"On disk" means on the primary's disk: see docs/jobs.md for replication.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import psycopg
import structlog
from psycopg import AsyncConnection, AsyncCursor, errors
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from splitserve.errors import SplitserveError, StorageFull, Unavailable
from splitserve.jobs import events
from splitserve.jobs.records import (
    ACTIVE,
    OLDEST_SHARE,
    Claimed,
    Delivery,
    DeliveryAttempt,
    DeliveryState,
    Finish,
    Job,
    JobError,
    Lease,
    NewJob,
    Payload,
    Result,
    Retry,
    StoreRules,
    StoreState,
    Submitted,
    Swept,
    Tally,
)
from splitserve.jobs.row_mapping import claimed_of, delivery_of, encode, encode_optional, job_of, migrations
from splitserve.jobs.store import (
    SWEEP_SIZE,
    died,
    expired,
    internal_error,
    key_gone,
    key_reused,
    out_of_attempts,
    store_unavailable,
)

CALL_TIMEOUT_S = 10.0
"""Of a transaction."""

CONNECT_TIMEOUT_S, CHECK_TIMEOUT_S = 5, 2.0
POOL_TIMEOUT_S = 2.0
"""How long a call waits for a connection: while the database is down, callers are told so after this."""

ANNOUNCE_INTERVAL_S = 0.1
"""At most one NOTIFY in this time: each takes a lock that all commits share."""

LISTENING_TIMEOUT_S = 5.0
"""How long a listener waits for an announcement of its own process."""

CHANNEL = "splitserve_jobs"

_MIGRATION_LOCK = 0x73706A62
_CONNECTION: dict[str, Any] = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "splitserve-jobs",
    "client_encoding": "UTF8",  # else text of a database in SQL_ASCII is read as bytes
}
_T = "splitserve_jobs"


def _epoch(column: str) -> str:
    return f"coalesce(extract(epoch FROM {column}), 0)::float8"


_COLUMNS = ", ".join(
    [
        "id, owner, status, model, version, priority",
        *map(_epoch, ("created", "started", "finished")),
        "attempt, timeout_s",
        *map(_epoch, ("expires", "remove_at")),
        "error, webhook, delivery",
    ]
)
_DUE = "status = 'queued' AND not_before <= now() AND (expires IS NULL OR expires > now())"
_CLAIM = f"""
WITH orphan AS MATERIALIZED (
    SELECT seq FROM {_T}.jobs WHERE status = 'running' AND attempt < %(max_attempts)s
        AND worker IN (SELECT id FROM {_T}.workers WHERE lease_until <= now())
    ORDER BY seq LIMIT %(n)s FOR UPDATE SKIP LOCKED
), oldest AS MATERIALIZED (
    SELECT seq FROM {_T}.jobs WHERE {_DUE} ORDER BY seq LIMIT %(n_oldest)s FOR UPDATE SKIP LOCKED
), best AS MATERIALIZED (
    SELECT seq FROM {_T}.jobs WHERE {_DUE} ORDER BY priority, seq LIMIT %(n)s FOR UPDATE SKIP LOCKED
), chosen AS MATERIALIZED (
    SELECT seq FROM (
        SELECT seq, 0 AS rank, 0 AS place FROM orphan
        UNION ALL SELECT seq, 1, 0 FROM oldest
        UNION ALL SELECT seq, 2, row_number() OVER () FROM best
    ) AS candidates GROUP BY seq ORDER BY min(rank), min(place), seq LIMIT %(n)s
)
UPDATE {_T}.jobs AS job SET status = 'running', attempt = attempt + 1, fence = fence + 1, worker = %(worker)s,
    started = coalesce(started, now())
FROM chosen WHERE job.seq = chosen.seq
RETURNING id, fence, attempt, owner, model, version, rights, request, request_ref, timeout_s
"""

Cursor = AsyncCursor[tuple[Any, ...]]


class PostgresStore:
    """Call it inside its ``async with``.

    Args:
        url: of the database, ``postgresql://…``; may be that of a pooler.
        rules: of the store.
        direct_url: for LISTEN, if ``url`` is that of a pooler in transaction mode.
        max_connections: of the pool.
    """

    def __init__(self, url: str, rules: StoreRules | None = None, *, direct_url: str = "", max_connections: int = 10) -> None:
        self._rules = rules or StoreRules()
        self._direct_url = make_conninfo(direct_url or url, **_CONNECTION)
        self._log = structlog.get_logger()
        self._pool: AsyncConnectionPool[AsyncConnection[tuple[Any, ...]]] = AsyncConnectionPool(
            make_conninfo(url, **_CONNECTION),
            min_size=1,
            max_size=max_connections,
            open=False,
            kwargs={"prepare_threshold": None},
            check=_check,
            timeout=POOL_TIMEOUT_S,
            max_lifetime=300.0,
            reconnect_timeout=1.0,  # then the next call tries again: waiting longer would only delay the recovery
        )
        self._is_migrated = False
        self._migrating = asyncio.Lock()
        self._has_news = asyncio.Event()
        self._notify: Callable[[], None] = lambda: None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> PostgresStore:
        await self._pool.open()
        self._tasks = [asyncio.create_task(self._keep_announcing()), asyncio.create_task(self._keep_listening())]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self._pool.close(timeout=2.0)

    # Connections.

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Cursor]:
        """A transaction, which is committed when the block ends.

        Raises:
            Unavailable: the database cannot be reached, or is read-only after a failover.
            StorageFull: its disk is full.
        """
        try:
            async with self._pool.connection() as connection, _limited(connection, CALL_TIMEOUT_S):
                try:
                    if not self._is_migrated:
                        await self._migrate(connection)
                    async with connection.cursor() as cursor:
                        yield cursor
                    await connection.commit()
                except (errors.ReadOnlySqlTransaction, errors.CannotConnectNow, errors.AdminShutdown):
                    await connection.close()  # it leads to what is no longer the primary
                    raise
        except errors.DiskFull as error:
            raise StorageFull("the disk of the job database is full: jobs can be read, not submitted", stage="jobs") from error
        except (psycopg.Error, PoolTimeout, TimeoutError, OSError) as error:
            # What the driver says of a call to the database that failed. Callers get a 503.
            self._log.warning("job store failed", reason=str(error).strip(), code=type(error).__name__)
            raise store_unavailable() from error
        except SplitserveError:
            raise
        except Exception as error:
            raise internal_error(error) from error

    async def _migrate(self, connection: AsyncConnection[tuple[Any, ...]]) -> None:
        async with self._migrating:
            if self._is_migrated:
                return
            async with connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
                await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {_T}")
                await connection.execute(f"CREATE TABLE IF NOT EXISTS {_T}.migrations (number integer PRIMARY KEY)")
                found = await (await connection.execute(f"SELECT number FROM {_T}.migrations")).fetchall()
                known = migrations("postgres")
                if found and max(found)[0] > known[-1][0]:
                    raise self._unusable(
                        f"the database has schema {max(found)[0]}, this splitserve knows up to {known[-1][0]}; upgrade it",
                        "schema",
                    )
                encoding = connection.info.parameter_status("server_encoding")
                if encoding not in ("UTF8", "SQL_ASCII"):
                    raise self._unusable(f"the database has encoding {encoding}, expected UTF8", "encoding")
                for number, text in known:
                    if (number,) not in found:
                        await connection.execute(text.encode())
                        await connection.execute(f"INSERT INTO {_T}.migrations VALUES (%s)", (number,))
            self._is_migrated = True

    def _unusable(self, reason: str, code: str) -> Unavailable:
        self._log.error("job store failed", reason=reason, code=code)
        return store_unavailable()

    # Announcements.

    def announce(self) -> None:
        self._has_news.set()

    def on_announcement(self, notify: Callable[[], None]) -> None:
        self._notify = notify

    async def _keep_announcing(self) -> None:
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            with contextlib.suppress(Unavailable, StorageFull):
                async with self._transaction() as cursor:
                    await cursor.execute(f"NOTIFY {CHANNEL}")
            await asyncio.sleep(ANNOUNCE_INTERVAL_S)

    async def _keep_listening(self) -> None:
        while True:
            with contextlib.suppress(psycopg.Error, OSError):
                connection = await AsyncConnection.connect(self._direct_url, autocommit=True)
                async with connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    self._notify()
                    await self._check_listening(connection)
                    async for _ in connection.notifies():
                        self._notify()
            await asyncio.sleep(1.0)

    async def _check_listening(self, connection: AsyncConnection[tuple[Any, ...]]) -> None:
        """A pooler accepts LISTEN and delivers nothing: wait for an announcement of our own."""
        self.announce()
        async for _ in connection.notifies(timeout=LISTENING_TIMEOUT_S, stop_after=1):
            self._notify()
            return
        # Other replicas' jobs are noticed by polling only. If DATABASE_URL is that of a pooler, set DATABASE_DIRECT_URL.
        self._log.warning("announcements not received", see="JOBS_DATABASE_DIRECT_URL")

    # The interface.

    async def submit(self, new: NewJob) -> Submitted:
        try:
            async with self._transaction() as cursor:
                return await self._submit(cursor, new)
        except Unavailable as error:
            if isinstance(error.__cause__, PoolTimeout):  # nothing was sent
                raise
            return await self._looked_up(new, error)

    async def _looked_up(self, new: NewJob, error: Unavailable) -> Submitted:
        """The job, if the transaction was committed although the connection was lost.

        Raises:
            Unavailable: it is not there, or that is unknown: then the message says so.
        """
        try:
            job = await self.get(new.owner, new.id)
        except Unavailable:
            advice = "" if new.key else "; send an Idempotency-Key to submit again without a duplicate"
            raise Unavailable(f"{error.message}: it is unknown whether job {new.id} was stored{advice}", stage="jobs") from error
        if job is None:
            raise error
        return Submitted(job, is_new=True)

    async def _submit(self, cursor: Cursor, new: NewJob) -> Submitted:
        if new.key:
            taken = await _one(
                cursor,
                f"INSERT INTO {_T}.keys VALUES (%s, %s, %s, %s, now() + make_interval(secs => %s)) ON CONFLICT (owner, key) "
                "DO UPDATE SET fingerprint = excluded.fingerprint, job = excluded.job, valid_until = excluded.valid_until "
                "WHERE keys.valid_until <= now() RETURNING job",
                (new.owner, new.key, new.fingerprint, new.id, self._rules.key_ttl_s),
            )
            if taken is None:
                known = await self._job_of_key(cursor, new.owner, new.key, new.fingerprint)
                if known is None:  # its time was over in this moment
                    raise store_unavailable()
                return Submitted(known, is_new=False)
        row = await _one(
            cursor,
            f"INSERT INTO {_T}.jobs (id, owner, rights, model, version, status, priority, timeout_s, expires, rendering, "
            "request, request_ref, webhook) "
            "VALUES (%s, %s, %s, %s, %s, 'queued', %s, %s, now() + make_interval(secs => %s), %s, %s, %s, "
            f"%s) RETURNING {_COLUMNS}",
            (
                *(new.id, new.owner, encode(new.rights), new.model, new.version, new.priority, new.timeout_s),
                *(new.expires_s or None, new.rendering, new.request.data, new.request.ref, encode_optional(new.webhook)),
            ),
        )
        assert row is not None, "an INSERT returns its row"
        return Submitted(job_of(row), is_new=True)

    async def job_of_key(self, owner: str, key: str, fingerprint: bytes) -> Job | None:
        async with self._transaction() as cursor:
            return await self._job_of_key(cursor, owner, key, fingerprint)

    async def _job_of_key(self, cursor: Cursor, owner: str, key: str, fingerprint: bytes) -> Job | None:
        found = await _one(
            cursor,
            f"SELECT fingerprint, job FROM {_T}.keys WHERE owner = %s AND key = %s AND valid_until > now()",
            (owner, key),
        )
        if found is None:
            return None
        if found[0] != fingerprint:
            raise key_reused(key)
        job = await self._get(cursor, owner, found[1])
        if job is None:
            raise key_gone(key)
        return job

    async def get(self, owner: str, job_id: str) -> Job | None:
        async with self._transaction() as cursor:
            return await self._get(cursor, owner, job_id)

    async def _get(self, cursor: Cursor, owner: str, job_id: str) -> Job | None:
        row = await _one(cursor, f"SELECT {_COLUMNS} FROM {_T}.jobs WHERE id = %s AND owner = %s", (job_id, owner))
        return None if row is None else job_of(row)

    async def result(self, owner: str, job_id: str) -> Result | None:
        async with self._transaction() as cursor:
            row = await _one(
                cursor,
                f"SELECT {_COLUMNS}, rendering, answer, answer_ref FROM {_T}.jobs WHERE id = %s AND owner = %s",
                (job_id, owner),
            )
        return None if row is None else Result(job_of(row[:-3]), row[-3], Payload(row[-2], row[-1]))

    async def list_jobs(self, owner: str, *, model: str = "", status: str = "", limit: int = 100, after: str = "") -> list[Job]:
        query, arguments = f"SELECT {_COLUMNS} FROM {_T}.jobs WHERE owner = %s", [owner]
        for column, value in (("model", model), ("status", status)):
            if value:
                query += f" AND {column} = %s"
                arguments.append(value)
        if after:
            query += f" AND seq < coalesce((SELECT seq FROM {_T}.jobs WHERE id = %s AND owner = %s), 0)"
            arguments += [after, owner]
        async with self._transaction() as cursor:
            await cursor.execute(f"{query} ORDER BY seq DESC LIMIT %s".encode(), (*arguments, limit))
            return [job_of(row) for row in await cursor.fetchall()]

    async def delete(self, owner: str, job_id: str, *, keep_ended: bool = False) -> tuple[Job, list[str]] | None:
        async with self._transaction() as cursor:
            row = await _one(
                cursor,
                f"SELECT seq, status, request_ref, answer_ref FROM {_T}.jobs WHERE id = %s AND owner = %s FOR UPDATE",
                (job_id, owner),
            )
            if row is None:
                return None
            seq, status, request_ref, answer_ref = row
            if status in ACTIVE:
                await self._end(cursor, seq, "cancelled")
            job = await self._get(cursor, owner, job_id)
            assert job is not None, "the row is locked"
            if status in ACTIVE:
                return job, [request_ref] if request_ref else []
            if keep_ended:
                return job, []
            await cursor.execute(f"DELETE FROM {_T}.jobs WHERE seq = %s", (seq,))
            return job, [answer_ref] if answer_ref else []

    async def _end(
        self, cursor: Cursor, seq: int, status: str, *, answer: Payload | None = None, error: JobError | None = None
    ) -> str:
        """Write a final state of a locked row, and the webhook if it was asked for. Returns the id."""
        answer = answer or Payload()
        row = await _one(
            cursor,
            f"UPDATE {_T}.jobs SET status = %s, finished = now(), remove_at = now() + make_interval(secs => %s), answer = %s, "
            f"answer_ref = %s, error = %s, request = '', request_ref = '' WHERE seq = %s RETURNING {_COLUMNS}",
            (status, self._rules.ttl_s, answer.data, answer.ref, encode_optional(error), seq),
        )
        assert row is not None, "the row is locked"
        job = job_of(row)
        if (due := events.outbox_row(job)) is not None:
            await cursor.execute(
                f"INSERT INTO {_T}.deliveries (id, job, owner, url, host, body) VALUES (%s, %s, %s, %s, %s, %s) "
                "ON CONFLICT DO NOTHING",
                due,
            )
            await cursor.execute(f"UPDATE {_T}.jobs SET delivery = %s WHERE seq = %s", (encode(DeliveryState("pending")), seq))
        return job.id

    async def claim(self, worker: str, n: int, lease_s: float) -> Sequence[Claimed]:
        async with self._transaction() as cursor:
            await self._beat(cursor, worker, lease_s)
            await cursor.execute(
                f"SELECT seq, attempt, model FROM {_T}.jobs WHERE status = 'running' AND attempt >= %s AND worker IN "
                f"(SELECT id FROM {_T}.workers WHERE lease_until <= now()) ORDER BY seq LIMIT %s FOR UPDATE SKIP LOCKED",
                (self._rules.max_attempts, n),
            )
            for seq, attempt, model in await cursor.fetchall():
                await self._end(cursor, seq, "failed", error=died(attempt, model))
            await cursor.execute(
                _CLAIM,
                {
                    "n": n,
                    "n_oldest": max(1, n // OLDEST_SHARE) if n > 1 else 0,
                    "max_attempts": self._rules.max_attempts,
                    "worker": worker,
                },
            )
            return [claimed_of(row) for row in await cursor.fetchall()]

    async def _beat(self, cursor: Cursor, worker: str, lease_s: float) -> None:
        await cursor.execute(
            f"INSERT INTO {_T}.workers VALUES (%s, now() + make_interval(secs => %s)) "
            "ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until",
            (worker, lease_s),
        )

    async def give_back_all_but(self, worker: str, leases: Sequence[Lease]) -> int:
        async with self._transaction() as cursor:
            await cursor.execute(
                f"UPDATE {_T}.jobs SET status = 'queued', attempt = attempt - 1 "
                "WHERE status = 'running' AND worker = %s AND id <> ALL(%s)",
                (worker, [lease.id for lease in leases]),
            )
            return cursor.rowcount

    async def renew(self, worker: str, leases: Sequence[Lease], lease_s: float) -> Sequence[Lease]:
        async with self._transaction() as cursor:
            await self._beat(cursor, worker, lease_s)
            await cursor.execute(
                f"SELECT id, fence FROM {_T}.jobs WHERE id = ANY(%s) AND status = 'running'", ([lease.id for lease in leases],)
            )
            held = {Lease(*row) for row in await cursor.fetchall()}
        return [lease for lease in leases if lease not in held]

    async def finish(self, finishes: Sequence[Finish]) -> Sequence[bool]:
        async with self._transaction() as cursor:
            held = await _held(cursor, [finish.lease for finish in finishes])
            for finish in finishes:
                if finish.lease in held:
                    status = "succeeded" if finish.error is None else "failed"
                    await self._end(cursor, held[finish.lease][0], status, answer=finish.answer, error=finish.error)
        return [finish.lease in held for finish in finishes]

    async def retry(self, retries: Sequence[Retry]) -> Sequence[bool]:
        async with self._transaction() as cursor:
            held = await _held(cursor, [retry.lease for retry in retries])
            for retry in retries:
                if retry.lease not in held:
                    continue
                seq, attempt = held[retry.lease]
                if retry.error is not None and attempt >= self._rules.max_attempts:
                    await self._end(cursor, seq, "failed", error=out_of_attempts(retry.error, attempt))
                    continue
                await cursor.execute(
                    f"UPDATE {_T}.jobs SET status = 'queued', attempt = %s, not_before = now() + make_interval(secs => %s), "
                    "error = %s WHERE seq = %s",
                    (attempt if retry.error else attempt - 1, retry.delay_s, encode_optional(retry.error), seq),
                )
        return [retry.lease in held for retry in retries]

    async def sweep(self) -> Swept:
        async with self._transaction() as cursor:
            await cursor.execute(
                f"SELECT seq, model, request_ref FROM {_T}.jobs WHERE status = 'queued' AND expires <= now() LIMIT %s "
                "FOR UPDATE SKIP LOCKED",
                (SWEEP_SIZE,),
            )
            late = await cursor.fetchall()
            ended = [await self._end(cursor, seq, "failed", error=expired(model)) for seq, model, _ in late]
            await cursor.execute(
                f"WITH old AS MATERIALIZED (SELECT seq FROM {_T}.jobs WHERE remove_at <= now() LIMIT %s FOR UPDATE SKIP LOCKED) "
                f"DELETE FROM {_T}.jobs USING old WHERE jobs.seq = old.seq RETURNING answer_ref",
                (SWEEP_SIZE,),
            )
            removed = await cursor.fetchall()
            await cursor.execute(
                f"WITH old AS MATERIALIZED (SELECT owner, key FROM {_T}.keys WHERE valid_until <= now() LIMIT %s FOR UPDATE "
                f"SKIP LOCKED) DELETE FROM {_T}.keys USING old WHERE keys.owner = old.owner AND keys.key = old.key",
                (SWEEP_SIZE,),
            )
            n_keys = cursor.rowcount
            await cursor.execute(
                f"DELETE FROM {_T}.deliveries WHERE status <> 'pending' AND finished <= now() - make_interval(secs => %s)",
                (self._rules.ttl_s,),
            )
            await cursor.execute(
                f"DELETE FROM {_T}.workers WHERE lease_until <= now() - interval '1 hour' AND NOT EXISTS "
                f"(SELECT 1 FROM {_T}.jobs WHERE status = 'running' AND worker = workers.id)"
            )
            await cursor.execute(
                f"WITH gone AS (DELETE FROM {_T}.tallies RETURNING *) INSERT INTO {_T}.tallies "
                "SELECT owner, status, sum(n) FROM gone GROUP BY owner, status HAVING sum(n) <> 0"
            )
        freed = [ref for *_, ref in (*late, *removed) if ref]
        return Swept(ended, freed, is_complete=SWEEP_SIZE not in (len(late), len(removed), n_keys))

    async def finished_among(self, job_ids: Sequence[str]) -> list[str]:
        async with self._transaction() as cursor:
            await cursor.execute(
                f"SELECT id FROM {_T}.jobs WHERE id = ANY(%s) AND status IN ('queued', 'running')", (list(job_ids),)
            )
            active = {job_id for (job_id,) in await cursor.fetchall()}
        return list(set(job_ids) - active)

    async def claim_delivery(self, lease_s: float, but_hosts: Sequence[str]) -> Delivery | None:
        async with self._transaction() as cursor:
            row = await _one(
                cursor,
                f"WITH due AS MATERIALIZED (SELECT id FROM {_T}.deliveries WHERE status = 'pending' AND not_before <= now() AND "
                "host <> ALL(%s) ORDER BY not_before LIMIT 1 FOR UPDATE SKIP LOCKED) "
                f"UPDATE {_T}.deliveries AS each SET not_before = now() + make_interval(secs => %s), attempt = attempt + 1 "
                f"FROM due WHERE each.id = due.id RETURNING each.id, job, owner, url, body, attempt, {_epoch('created')}",
                (list(but_hosts), lease_s),
            )
        return None if row is None else delivery_of(row)

    async def finish_delivery(self, attempt: DeliveryAttempt) -> None:
        state = attempt.state
        async with self._transaction() as cursor:
            row = await _one(
                cursor,
                f"UPDATE {_T}.deliveries SET status = %s, not_before = now() + make_interval(secs => %s), "
                "finished = CASE WHEN %s THEN now() END "
                "WHERE id = %s AND attempt = %s AND status = 'pending' RETURNING job",
                (state.status, attempt.retry_s or 0.0, attempt.retry_s is None, attempt.id, state.attempt),
            )
            if row is not None:
                await cursor.execute(f"UPDATE {_T}.jobs SET delivery = %s WHERE id = %s", (encode(state), row[0]))

    async def state(self) -> StoreState:
        async with self._transaction() as cursor:
            await cursor.execute(
                f"SELECT owner, status, sum(n)::bigint FROM {_T}.tallies GROUP BY owner, status HAVING sum(n) > 0"
            )
            tallies = [Tally(*row) for row in await cursor.fetchall()]
            oldest = await _one(
                cursor,
                f"SELECT extract(epoch FROM now() - created)::float8 FROM {_T}.jobs WHERE status = 'queued' ORDER BY seq LIMIT 1",
            )
            outbox = await _one(cursor, f"SELECT count(*) FROM {_T}.deliveries WHERE status = 'pending'")
        return StoreState(tallies, 0.0 if oldest is None else max(0.0, oldest[0]), outbox[0] if outbox else 0)

    async def known_refs(self, refs: Sequence[str]) -> list[str]:
        async with self._transaction() as cursor:
            await cursor.execute(
                f"SELECT request_ref FROM {_T}.jobs WHERE request_ref = ANY(%(refs)s) AND request_ref <> '' UNION "
                f"SELECT answer_ref FROM {_T}.jobs WHERE answer_ref = ANY(%(refs)s) AND answer_ref <> ''",
                {"refs": list(refs)},
            )
            return [ref for (ref,) in await cursor.fetchall()]


@contextlib.asynccontextmanager
async def _limited(connection: AsyncConnection[Any], seconds: float) -> AsyncIterator[None]:
    """Shut the connection down if the block takes longer, so that it ends with an error.

    A network that is broken reports none. To cancel the task would not do: psycopg then asks the server to cancel the query, and
    waits for that.
    """
    timer = asyncio.get_running_loop().call_later(seconds, _shut_down, connection)
    try:
        yield
    finally:
        timer.cancel()


def _shut_down(connection: AsyncConnection[Any]) -> None:
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


async def _check(connection: AsyncConnection[Any]) -> None:
    async with _limited(connection, CHECK_TIMEOUT_S):
        await AsyncConnectionPool.check_connection(connection)


async def _one(cursor: Cursor, query: str, arguments: Sequence[Any] = ()) -> tuple[Any, ...] | None:
    await cursor.execute(query.encode(), arguments)
    return await cursor.fetchone()


async def _held(cursor: Cursor, leases: Sequence[Lease]) -> dict[Lease, tuple[int, int]]:
    """Number and attempt of the jobs on which the claims are still the newest; their rows are locked."""
    await cursor.execute(
        f"SELECT id, fence, seq, attempt FROM {_T}.jobs WHERE id = ANY(%s) AND status = 'running' ORDER BY seq FOR UPDATE",
        ([lease.id for lease in leases],),
    )
    found = {Lease(row[0], row[1]): (row[2], row[3]) for row in await cursor.fetchall()}
    return {lease: found[lease] for lease in leases if lease in found}
