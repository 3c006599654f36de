"""The job store in a folder: SQLite, embedded, for one process. All of it runs in one thread.

1. Calls queue up while a transaction is being written to disk; the next transaction contains all of them (group commit), so that
   64 callers share one fsync. Results are delivered after the commit.
2. ``synchronous=FULL``: what was committed survives a loss of power. ``BEGIN IMMEDIATE``: no transaction begins as a reader.
3. If a transaction fails, it is rolled back and each of its calls is tried alone, so that one call does not fail others.
4. One process owns the folder, by a lock file that names it: it judges leases by its own clock, which never steps back. Leases of
   the process before are void, and its jobs are claimed again at once.
5. ``auto_vacuum=INCREMENTAL`` with small steps after each sweep gives the disk space of removed jobs back.

Source: SQLite, "Write-Ahead Logging", "How To Corrupt An SQLite Database File".
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import structlog

from splitserve.errors import SplitserveError, StorageFull
from splitserve.jobs import events
from splitserve.jobs.folder import DATABASE, LOCK, check_file_system, locked
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

T = TypeVar("T")
Connection = sqlite3.Connection

MAX_GROUP = 512
"""Calls in one transaction at most."""

MAX_DELAY_S = 7200.0
"""No attempt, at a job or at a webhook, is put off for longer."""

JOURNAL_LIMIT_BYTES = 64 * 1024 * 1024
"""To which the WAL is truncated when it is written back."""

VACUUM_PAGES = 1000
"""Free pages given back after each step of a sweep."""

_COLUMNS = (
    "id, owner, status, model, version, priority, created, started, finished, attempt, timeout_s, expires, remove_at, error, "
    "webhook, delivery"
)


class _Call(NamedTuple):
    act: Callable[[Connection], Any]
    answer: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    is_write: bool


class SqliteStore:
    """Open it with `open`, outside of any event loop if it is to be shared by several.

    Args:
        folder: which it owns; created with mode 0700.
        rules: of the store.
        reserve_bytes: with less free space on the disk, new jobs are refused; the rest works on.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        folder: Path,
        rules: StoreRules | None = None,
        *,
        reserve_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._rules = rules or StoreRules()
        self._reserve_bytes = reserve_bytes
        self._clock = clock
        self._epoch = wall_clock() - clock()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._is_closed = False
        self._is_vacuuming = False
        self._lock: int | None = None

    def open(self, *, wait_s: float = 0.0) -> None:
        """Lock the folder, migrate the database and start the thread.

        Args:
            wait_s: how long to wait for another process to release the folder.

        Raises:
            FolderInUse, NetworkFileSystem: the folder cannot be used.
            OSError, sqlite3.Error: the database cannot be opened.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        check_file_system(self._folder)
        self._lock = locked(self._folder / LOCK, wait_s)
        began: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(began,), name="job store", daemon=True)
        self._thread.start()
        if (error := began.get()) is not None:
            self._release()
            raise error

    @property
    def path(self) -> Path:
        """Of the database."""
        return self._folder / DATABASE

    def now(self) -> float:
        """Seconds since the epoch, by a clock that does not step."""
        return self._epoch + self._clock()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # The thread.

    def _run(self, began: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            connection = connect(self.path)
            migrate(connection)
            now = self.now()
            connection.execute("UPDATE jobs SET lease_until = 0 WHERE status = 'running'")
            # Delays that were set by a clock which has been set back since.
            late = (now + MAX_DELAY_S,)
            connection.execute("UPDATE jobs SET not_before = 0 WHERE status = 'queued' AND not_before > ?", late)
            connection.execute("UPDATE deliveries SET not_before = 0 WHERE status = 'pending' AND not_before > ?", late)
        except BaseException as error:
            began.put(error)
            return
        began.put(None)
        with contextlib.closing(connection):
            while (calls := self._next_calls()) is not None:
                self._serve(connection, calls)
            with contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _next_calls(self) -> list[_Call] | None:
        """Wait for calls; None when the store is closed."""
        first = self._calls.get()
        if first is None:
            return None
        calls = [first]
        while len(calls) < MAX_GROUP:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            if call is None:
                self._calls.put(None)
                break
            calls.append(call)
        return calls

    def _serve(self, connection: Connection, calls: list[_Call]) -> None:
        try:
            outcomes = self._transaction(connection, calls)
        except Exception:
            outcomes = []
            for call in calls:
                try:
                    outcomes += self._transaction(connection, [call])
                except Exception as error:
                    outcomes.append(_store_error(error))
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
        for call, outcome in zip(calls, outcomes, strict=True):
            by_loop.setdefault(call.loop, []).append((call.answer, outcome))
        for loop, settled in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_settle, settled)
        if self._is_vacuuming:
            self._is_vacuuming = False
            with contextlib.suppress(sqlite3.Error):  # the next sweep tries again
                connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")  # `execute` would free one page only

    def _transaction(self, connection: Connection, calls: Iterable[_Call]) -> list[Any]:
        """The result of each call, or the `SplitserveError` that it raised before it wrote anything."""
        outcomes = []
        connection.execute("BEGIN IMMEDIATE" if any(call.is_write for call in calls) else "BEGIN")
        try:
            for call in calls:
                try:
                    outcomes.append(call.act(connection))
                except SplitserveError as error:
                    outcomes.append(error)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return outcomes

    async def _call(self, act: Callable[[Connection], T], *, is_write: bool = True) -> T:
        if self._pid != os.getpid():
            raise RuntimeError("a job store cannot be used in a forked process: close() there would drop this process's locks")
        if self._is_closed:
            raise store_unavailable()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._calls.put(_Call(act, answer, loop, is_write))
        return await answer

    async def _read(self, act: Callable[[Connection], T]) -> T:
        return await self._call(act, is_write=False)

    # The interface.

    async def submit(self, new: NewJob) -> Submitted:
        if self._reserve_bytes and shutil.disk_usage(self._folder).free < self._reserve_bytes:
            raise _full()
        return await self._call(lambda connection: self._submit(connection, new))

    def _submit(self, connection: Connection, new: NewJob) -> Submitted:
        now = self.now()
        if new.key:
            if (known := _job_of_key(connection, new.owner, new.key, new.fingerprint, now)) is not None:
                return Submitted(known, is_new=False)
            connection.execute(
                "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?)",
                (new.owner, new.key, new.fingerprint, new.id, now + self._rules.key_ttl_s),
            )
        expires = now + new.expires_s if new.expires_s else 0.0
        connection.execute(
            "INSERT INTO jobs (id, owner, rights, model, version, status, priority, created, timeout_s, expires, rendering, "
            "request, request_ref, webhook) VALUES (?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(new.id, new.owner, encode(new.rights), new.model, new.version, new.priority, now, new.timeout_s, expires),
                *(new.rendering, new.request.data, new.request.ref, encode_optional(new.webhook)),
            ),
        )  # fmt: skip
        job = Job(
            id=new.id,
            owner=new.owner,
            status="queued",
            model=new.model,
            version=new.version,
            priority=new.priority,
            created=now,
            timeout_s=new.timeout_s,
            expires=expires,
            webhook=new.webhook,
        )
        return Submitted(job, is_new=True)

    async def job_of_key(self, owner: str, key: str, fingerprint: bytes) -> Job | None:
        return await self._read(lambda connection: _job_of_key(connection, owner, key, fingerprint, self.now()))

    async def get(self, owner: str, job_id: str) -> Job | None:
        return await self._read(lambda connection: _get(connection, owner, job_id))

    async def result(self, owner: str, job_id: str) -> Result | None:
        def read(connection: Connection) -> Result | None:
            row = connection.execute(
                f"SELECT {_COLUMNS}, rendering, answer, answer_ref FROM jobs WHERE id = ? AND owner = ?",
                (job_id, owner),
            ).fetchone()
            return None if row is None else Result(job_of(row[:-3]), row[-3], Payload(row[-2], row[-1]))

        return await self._read(read)

    async def list_jobs(self, owner: str, *, model: str = "", status: str = "", limit: int = 100, after: str = "") -> list[Job]:
        def read(connection: Connection) -> list[Job]:
            query, arguments = f"SELECT {_COLUMNS} FROM jobs WHERE owner = ?", [owner]
            for column, value in (("model", model), ("status", status)):
                if value:
                    query += f" AND {column} = ?"
                    arguments.append(value)
            if after:
                query += " AND seq < coalesce((SELECT seq FROM jobs WHERE id = ? AND owner = ?), 0)"
                arguments += [after, owner]
            rows = connection.execute(f"{query} ORDER BY seq DESC LIMIT ?", (*arguments, limit)).fetchall()
            return [job_of(row) for row in rows]

        return await self._read(read)

    async def delete(self, owner: str, job_id: str, *, keep_ended: bool = False) -> tuple[Job, list[str]] | None:
        def act(connection: Connection) -> tuple[Job, list[str]] | None:
            row = connection.execute(
                "SELECT seq, status, request_ref, answer_ref FROM jobs WHERE id = ? AND owner = ?", (job_id, owner)
            ).fetchone()
            if row is None:
                return None
            seq, status, request_ref, answer_ref = row
            if status in ACTIVE:
                self._end(connection, seq, "cancelled")
            job = _get(connection, owner, job_id)
            assert job is not None, "nobody else writes in this transaction"
            if status in ACTIVE:
                return job, [request_ref] if request_ref else []
            if keep_ended:
                return job, []
            connection.execute("DELETE FROM jobs WHERE seq = ?", (seq,))
            return job, [answer_ref] if answer_ref else []

        return await self._call(act)

    def _end(
        self, connection: Connection, seq: int, status: str, *, answer: Payload | None = None, error: JobError | None = None
    ) -> str:
        """Write a final state, and the webhook if it was asked for. Returns the id."""
        now = self.now()
        answer = answer or Payload()
        row = connection.execute(
            "UPDATE jobs SET status = ?, finished = ?, remove_at = ?, answer = ?, answer_ref = ?, error = ?, request = x'', "
            f"request_ref = '' WHERE seq = ? RETURNING {_COLUMNS}",
            (
                status, now, now + self._rules.ttl_s, answer.data, answer.ref, encode_optional(error), seq,
            ),
        ).fetchone()  # fmt: skip
        job = job_of(row)
        if (due := events.outbox_row(job)) is not None:
            connection.execute(
                "INSERT OR IGNORE INTO deliveries (id, job, owner, url, host, body, created, not_before) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*due, now, now),
            )
            connection.execute("UPDATE jobs SET delivery = ? WHERE seq = ?", (encode(DeliveryState("pending")), seq))
        return job.id

    def announce(self) -> None:
        """Does nothing: no other process shares the store."""

    def on_announcement(self, notify: Callable[[], None]) -> None:
        """Does nothing: no other process shares the store."""

    async def claim(self, worker: str, n: int, lease_s: float) -> Sequence[Claimed]:
        def act(connection: Connection) -> list[Claimed]:
            now = self.now()
            orphans = connection.execute(
                "SELECT seq, attempt, model FROM jobs WHERE status = 'running' AND lease_until <= ? ORDER BY lease_until LIMIT ?",
                (now, n),
            ).fetchall()
            chosen = []
            for seq, attempt, model in orphans:
                if attempt >= self._rules.max_attempts:
                    self._end(connection, seq, "failed", error=died(attempt, model))
                else:
                    chosen.append(seq)
            chosen += self._queued(connection, n - len(chosen), now)
            marks = ", ".join("?" * len(chosen))
            rows = connection.execute(
                "UPDATE jobs SET status = 'running', attempt = attempt + 1, fence = fence + 1, lease_until = ?, worker = ?, "
                f"started = CASE started WHEN 0 THEN ? ELSE started END WHERE seq IN ({marks}) "
                "RETURNING id, fence, attempt, owner, model, version, rights, request, request_ref, timeout_s",
                (now + lease_s, worker, now, *chosen),
            ).fetchall()
            return [claimed_of(row) for row in rows]

        return await self._call(act)

    def _queued(self, connection: Connection, n: int, now: float) -> list[int]:
        """Jobs to claim: the oldest ones, as many as are their share, and the others by priority."""
        if n <= 0:
            return []
        due = "status = 'queued' AND not_before <= ? AND (expires = 0 OR expires > ?)"
        found: dict[int, None] = {}
        n_oldest = max(1, n // OLDEST_SHARE) if n > 1 else 0
        for order, limit in (("seq", n_oldest), ("priority, seq", n)):
            for (seq,) in connection.execute(f"SELECT seq FROM jobs WHERE {due} ORDER BY {order} LIMIT ?", (now, now, limit)):
                if len(found) < n:
                    found[seq] = None
        return list(found)

    async def give_back_all_but(self, worker: str, leases: Sequence[Lease]) -> int:
        def act(connection: Connection) -> int:
            marks = ", ".join("?" * len(leases))
            return connection.execute(
                "UPDATE jobs SET status = 'queued', attempt = attempt - 1 "
                f"WHERE status = 'running' AND worker = ? AND id NOT IN ({marks})",
                (worker, *(lease.id for lease in leases)),
            ).rowcount

        return await self._call(act)

    async def renew(self, worker: str, leases: Sequence[Lease], lease_s: float) -> Sequence[Lease]:
        def act(connection: Connection) -> list[Lease]:
            until = self.now() + lease_s
            return [
                lease
                for lease in leases
                if not connection.execute(
                    "UPDATE jobs SET lease_until = ? WHERE id = ? AND fence = ? AND status = 'running'",
                    (until, lease.id, lease.fence),
                ).rowcount
            ]

        return await self._call(act)

    async def finish(self, finishes: Sequence[Finish]) -> Sequence[bool]:
        def act(connection: Connection) -> list[bool]:
            written = []
            for finish in finishes:
                held = _held(connection, finish.lease)
                if held is not None:
                    status = "succeeded" if finish.error is None else "failed"
                    self._end(connection, held[0], status, answer=finish.answer, error=finish.error)
                written.append(held is not None)
            return written

        return await self._call(act)

    async def retry(self, retries: Sequence[Retry]) -> Sequence[bool]:
        def act(connection: Connection) -> list[bool]:
            written, now = [], self.now()
            for retry in retries:
                held = _held(connection, retry.lease)
                written.append(held is not None)
                if held is None:
                    continue
                seq, attempt = held
                if retry.error is not None and attempt >= self._rules.max_attempts:
                    self._end(connection, seq, "failed", error=out_of_attempts(retry.error, attempt))
                    continue
                connection.execute(
                    "UPDATE jobs SET status = 'queued', attempt = ?, not_before = ?, error = ? WHERE seq = ?",
                    (
                        attempt if retry.error else attempt - 1,
                        now + retry.delay_s,
                        encode_optional(retry.error),
                        seq,
                    ),
                )
            return written

        return await self._call(act)

    async def sweep(self) -> Swept:
        def act(connection: Connection) -> Swept:
            now = self.now()
            late = connection.execute(
                "SELECT seq, model, request_ref FROM jobs WHERE status = 'queued' AND expires > 0 AND expires <= ? LIMIT ?",
                (now, SWEEP_SIZE),
            ).fetchall()
            ended = [self._end(connection, seq, "failed", error=expired(model)) for seq, model, _ in late]
            removed = connection.execute(
                "DELETE FROM jobs WHERE seq IN (SELECT seq FROM jobs WHERE remove_at > 0 AND remove_at <= ? LIMIT ?) "
                "RETURNING answer_ref",
                (now, SWEEP_SIZE),
            ).fetchall()
            keys = connection.execute(
                "DELETE FROM keys WHERE (owner, key) IN (SELECT owner, key FROM keys WHERE valid_until <= ? LIMIT ?)",
                (now, SWEEP_SIZE),
            ).rowcount
            connection.execute("DELETE FROM deliveries WHERE status <> 'pending' AND finished <= ?", (now - self._rules.ttl_s,))
            connection.execute("DELETE FROM tallies WHERE n = 0")
            freed = [ref for *_, ref in (*late, *removed) if ref]
            return Swept(ended, freed, is_complete=SWEEP_SIZE not in (len(late), len(removed), keys))

        swept = await self._call(act)
        self._is_vacuuming = True
        return swept

    async def finished_among(self, job_ids: Sequence[str]) -> list[str]:
        def read(connection: Connection) -> list[str]:
            marks = ", ".join("?" * len(job_ids))
            active = connection.execute(
                f"SELECT id FROM jobs WHERE id IN ({marks}) AND status IN ('queued', 'running')",
                tuple(job_ids),
            ).fetchall()
            return list(set(job_ids) - {job_id for (job_id,) in active})

        return await self._read(read)

    async def claim_delivery(self, lease_s: float, but_hosts: Sequence[str]) -> Delivery | None:
        def act(connection: Connection) -> Delivery | None:
            now, marks = self.now(), ", ".join("?" * len(but_hosts))
            row = connection.execute(
                "UPDATE deliveries SET not_before = ?, attempt = attempt + 1 WHERE id = (SELECT id FROM "
                f"deliveries WHERE status = 'pending' AND not_before <= ? AND host NOT IN ({marks}) "
                "ORDER BY not_before LIMIT 1) RETURNING id, job, owner, url, body, attempt, created",
                (now + lease_s, now, *but_hosts),
            ).fetchone()
            return None if row is None else delivery_of(row)

        return await self._call(act)

    async def finish_delivery(self, attempt: DeliveryAttempt) -> None:
        def act(connection: Connection) -> None:
            now, state = self.now(), attempt.state
            row = connection.execute(
                "UPDATE deliveries SET status = ?, not_before = ?, finished = ? "
                "WHERE id = ? AND attempt = ? AND status = 'pending' RETURNING job",
                (
                    *(state.status, now + (attempt.retry_s or 0.0), 0.0 if attempt.retry_s is not None else now),
                    *(attempt.id, state.attempt),
                ),
            ).fetchone()
            if row is not None:
                connection.execute("UPDATE jobs SET delivery = ? WHERE id = ?", (encode(state), row[0]))

        await self._call(act)

    async def state(self) -> StoreState:
        def read(connection: Connection) -> StoreState:
            tallies = [Tally(*row) for row in connection.execute("SELECT owner, status, n FROM tallies WHERE n > 0")]
            oldest = connection.execute("SELECT created FROM jobs WHERE status = 'queued' ORDER BY seq LIMIT 1").fetchone()
            (outbox,) = connection.execute("SELECT count(*) FROM deliveries WHERE status = 'pending'").fetchone()
            return StoreState(tallies, 0.0 if oldest is None else max(0.0, self.now() - oldest[0]), outbox)

        return await self._read(read)

    async def known_refs(self, refs: Sequence[str]) -> list[str]:
        def read(connection: Connection) -> list[str]:
            query = "SELECT 1 FROM jobs WHERE request_ref = ?1 UNION ALL SELECT 1 FROM jobs WHERE answer_ref = ?1 LIMIT 1"
            return [ref for ref in refs if ref and connection.execute(query, (ref,)).fetchone()]

        return await self._read(read)

    async def close(self) -> None:
        if not self._is_closed and self._pid == os.getpid():
            self._is_closed = True
            self._calls.put(None)
            await asyncio.to_thread(self._thread.join)
            self._release()


def connect(path: Path) -> Connection:
    """A connection with the settings that durability needs. ``auto_vacuum`` has to be set before the first table."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=5.0, check_same_thread=False, cached_statements=256)
    path.chmod(0o600)
    for pragma in (
        "auto_vacuum = INCREMENTAL",
        "journal_mode = WAL",
        "synchronous = FULL",
        f"journal_size_limit = {JOURNAL_LIMIT_BYTES}",
        "temp_store = MEMORY",
        "cache_size = -32768",
    ):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    return connection


def migrate(connection: Connection) -> None:
    """Apply the migrations that the database does not have yet, each in a transaction.

    Raises:
        sqlite3.DatabaseError: it was written by a newer splitserve.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    known = migrations("sqlite")
    if version > known[-1][0]:
        raise sqlite3.DatabaseError(f"the database has schema {version}, this splitserve knows up to {known[-1][0]}; upgrade it")
    for number, text in known:
        if number > version:
            connection.executescript(f"BEGIN IMMEDIATE; {text}; PRAGMA user_version = {number}; COMMIT;")


def _settle(settled: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for answer, outcome in settled:
        if answer.done():
            continue
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)


def _full() -> StorageFull:
    return StorageFull("the disk of the job store is full: jobs can be read and removed, not submitted", stage="jobs")


def _store_error(error: Exception) -> SplitserveError:
    if not isinstance(error, sqlite3.Error):
        return internal_error(error)
    name = getattr(error, "sqlite_errorname", "")
    # What SQLite says of a statement that failed. Callers get a 503, or 507 if the disk is full.
    structlog.get_logger().error("job store failed", reason=str(error), code=name)
    store_error = _full() if name == "SQLITE_FULL" else store_unavailable()
    store_error.__cause__ = error
    return store_error


def _get(connection: Connection, owner: str, job_id: str) -> Job | None:
    row = connection.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ? AND owner = ?", (job_id, owner)).fetchone()
    return None if row is None else job_of(row)


def _job_of_key(connection: Connection, owner: str, key: str, fingerprint: bytes, now: float) -> Job | None:
    found = connection.execute(
        "SELECT fingerprint, job FROM keys WHERE owner = ? AND key = ? AND valid_until > ?", (owner, key, now)
    ).fetchone()
    if found is None:
        return None
    if found[0] != fingerprint:
        raise key_reused(key)
    job = _get(connection, owner, found[1])
    if job is None:
        raise key_gone(key)
    return job


def _held(connection: Connection, lease: Lease) -> tuple[int, int] | None:
    """Number and attempt of a job, if the claim on it is still the newest."""
    found: tuple[int, int] | None = connection.execute(
        "SELECT seq, attempt FROM jobs WHERE id = ? AND fence = ? AND status = 'running'", (lease.id, lease.fence)
    ).fetchone()
    return found
