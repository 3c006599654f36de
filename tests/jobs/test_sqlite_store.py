"""What only the store in a folder has: its lock, its settings, group commit, and what it does on a full disk."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from splitserve.errors import Internal, StorageFull, Unavailable
from splitserve.jobs import folder, sqlite
from splitserve.jobs.folder import DATABASE, FolderInUse, NetworkFileSystem, file_system_of
from splitserve.jobs.records import (
    DeliveryAttempt,
    DeliveryState,
    Finish,
    NewJob,
    Payload,
    Retry,
    StoreRules,
    Submitted,
    Webhook,
    new_id,
)
from splitserve.jobs.sqlite import SqliteStore

HOUR = 3600.0


def job(request: bytes = b"rows", **options: object) -> NewJob:
    return NewJob(id=new_id(), owner="ann", model="penguins", version="1.1", request=Payload(request), **options)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "jobs")
    store.open()
    yield store
    await store.close()


async def test_every_commit_is_synced(store):
    """FULL: with NORMAL, what was acknowledged may be lost with the power."""
    read = await store._read(
        lambda connection: [
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode", "auto_vacuum")
        ]
    )

    assert read == [2, "wal", 2]


async def test_the_folder_is_for_its_owner_only(store, tmp_path):
    """It holds what callers sent."""
    assert (tmp_path / "jobs").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "jobs" / DATABASE).stat().st_mode & 0o777 == 0o600


async def test_calls_that_wait_are_committed_together(store):
    """64 callers share an fsync."""
    commits = []
    await store._read(lambda connection: connection.set_trace_callback(commits.append))

    await asyncio.gather(*[store.submit(job()) for _ in range(64)])

    assert commits.count("COMMIT") < 16


async def test_one_call_that_fails_fails_no_other(store):
    """The transaction that they shared is rolled back, and each is tried alone."""
    first = job()
    calls = [store.submit(job()), store.submit(first), store.submit(first), store.submit(job())]  # the id is there already

    outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert [isinstance(outcome, Unavailable) for outcome in outcomes] == [False, False, True, False]
    assert len(await store.list_jobs("ann")) == 3


async def test_a_call_that_fails_unexpectedly_fails_no_other(store):
    """The thread goes on, and nothing of the call is kept."""

    def misbehave(connection):
        connection.execute("DELETE FROM jobs")
        raise TypeError("nobody foresaw this")

    await store.submit(job())
    calls = [store.submit(job()), store._call(misbehave), store.get("ann", "\ud800"), store.submit(job())]

    outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [Submitted, Internal, Internal, Submitted]
    assert len(await store.list_jobs("ann")) == 3


async def test_a_folder_has_one_owner(store, tmp_path):
    """The second one is told who has it."""
    second = SqliteStore(tmp_path / "jobs")

    with pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
        second.open()


def test_the_folder_is_free_when_its_owner_was_killed(tmp_path):
    """The kernel releases the lock: there is no stale one to remove by hand."""
    program = (
        "import sys, pathlib; from splitserve.jobs.sqlite import SqliteStore; SqliteStore(pathlib.Path(sys.argv[1])).open();"
        "print('open', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "open\n"
    store = SqliteStore(tmp_path)
    with pytest.raises(FolderInUse, match=f"process {owner.pid}"):
        store.open()

    owner.kill()
    owner.communicate()

    store.open(wait_s=10)
    asyncio.run(store.close())


async def test_jobs_of_the_process_before_are_claimed_at_once(tmp_path):
    """Nobody else can be running them: the lock says so."""
    before = SqliteStore(tmp_path)
    before.open()
    await before.submit(job())
    await before.claim("w1", 1, HOUR)
    await before.close()

    after = SqliteStore(tmp_path)
    after.open()
    (claimed,) = await after.claim("w2", 1, HOUR)
    await after.close()

    assert claimed.attempt == 2


async def test_a_step_of_the_clock_moves_no_lease(tmp_path):
    """Leases are judged by the monotonic clock."""
    clocks = SimpleNamespace(wall=1_000_000.0, monotonic=50.0)
    store = SqliteStore(tmp_path, clock=lambda: clocks.monotonic, wall_clock=lambda: clocks.wall)
    store.open()
    await store.submit(job())
    await store.claim("w1", 1, 10.0)

    clocks.wall += 3600
    clocks.monotonic += 9
    before = await store.claim("w2", 1, 10.0)
    clocks.monotonic += 2
    after = await store.claim("w2", 1, 10.0)
    await store.close()

    assert (len(before), len(after)) == (0, 1)


async def test_a_clock_that_was_set_back_delays_nothing(tmp_path):
    """While no process ran: attempts that were put off, at jobs and at webhooks, are due."""
    before = SqliteStore(tmp_path, wall_clock=lambda: time.time() + 30 * 24 * HOUR)
    before.open()
    webhook = Webhook("https://hooks.example.org/")
    for _ in range(2):
        await before.submit(job(webhook=webhook))
    first, second = await before.claim("w1", 2, HOUR)
    await before.finish([Finish(first.lease, Payload(b"answer"))])
    await before.retry([Retry(second.lease, 60.0)])
    delivery = await before.claim_delivery(60.0, [])
    await before.finish_delivery(DeliveryAttempt(delivery.id, DeliveryState("pending", delivery.attempt), retry_s=60.0))
    await before.close()

    after = SqliteStore(tmp_path)
    after.open()
    claimed, again = await after.claim("w2", 2, HOUR), await after.claim_delivery(60.0, [])
    await after.close()

    assert [each.lease.id for each in claimed] == [second.lease.id]
    assert again.id == delivery.id


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p"])
def test_a_network_file_system_is_refused_by_name(tmp_path, monkeypatch, kind):
    """SQLite's locks are not reliable there; the message says what to do instead."""
    monkeypatch.setattr(folder, "file_system_of", lambda _: kind)

    with pytest.raises(NetworkFileSystem, match=f"{kind}.*PostgreSQL"):
        SqliteStore(tmp_path).open()


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path):
    """A mount below another one counts, and spaces in its path are written as an octal number."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path}/a\\040b nfs4 rw 0 0\n")
    (tmp_path / "a b").mkdir()

    assert file_system_of(tmp_path / "a b" / "jobs", str(mounts)) == "nfs4"
    assert file_system_of(tmp_path, str(mounts)) == "ext4"


async def test_a_full_disk_refuses_submits_only(tmp_path, monkeypatch):
    """With less than the reserve left: reading, removing and the end of jobs still work."""
    store = SqliteStore(tmp_path, reserve_bytes=1000)
    store.open()
    kept, removed = (await store.submit(job())).job, (await store.submit(job())).job
    (claimed,) = await store.claim("w1", 1, HOUR)
    usage = SimpleNamespace(free=999)
    monkeypatch.setattr(sqlite.shutil, "disk_usage", lambda _: usage)

    with pytest.raises(StorageFull):
        await store.submit(job())

    assert await store.finish([Finish(claimed.lease, Payload(b"answer"))]) == [True]
    assert (await store.result("ann", kept.id)).answer.data == b"answer"
    assert (await store.delete("ann", removed.id))[0].status == "cancelled"
    await store.sweep()
    usage.free = 1001
    assert (await store.submit(job(key="k"))).is_new
    await store.close()


async def test_what_the_disk_refuses_is_a_full_disk(store):
    """Also where the reserve did not catch it; nothing is lost, and the key is not taken."""
    await store._read(lambda connection: connection.execute("PRAGMA max_page_count = 60").fetchall())
    with pytest.raises(StorageFull):
        while True:
            await store.submit(job(b"x" * 10_000, key="k" + new_id()))
    refused = job(b"x" * 100_000, key="refused")
    with pytest.raises(StorageFull):
        await store.submit(refused)

    stored = await store.list_jobs("ann")
    await store._read(lambda connection: connection.execute("PRAGMA max_page_count = 100000").fetchall())

    assert stored
    assert (await store.submit(refused)).is_new


async def test_removed_jobs_give_their_disk_space_back(tmp_path):
    """The file shrinks in steps, after each sweep."""
    store = SqliteStore(tmp_path, StoreRules(ttl_s=0))
    store.open()
    for _ in range(40):
        await store.submit(job(b"x" * 100_000))
    for each in await store.list_jobs("ann"):
        await store.delete("ann", each.id)
    await store._read(lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
    full = store.path.stat().st_size

    for _ in range(10):
        await store.sweep()
    await store._read(lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())

    assert full > 4_000_000
    assert store.path.stat().st_size < full / 10
    await store.close()


async def test_a_newer_database_is_refused(tmp_path):
    """An older splitserve does not write to a schema that it does not know."""
    store = SqliteStore(tmp_path)
    store.open()
    await store.close()
    with sqlite3.connect(tmp_path / DATABASE) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()

    with pytest.raises(sqlite3.DatabaseError, match="schema 99"):
        SqliteStore(tmp_path).open()

    SqliteStore(tmp_path)  # the lock was released: a repaired folder can be opened


async def test_a_forked_process_cannot_use_the_store(store):
    """Closing the database there would drop the locks of its owner."""
    child = os.fork()
    if child == 0:
        try:
            asyncio.new_event_loop().run_until_complete(store.get("ann", "x"))
        except RuntimeError:
            os._exit(7)
        os._exit(0)

    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert (await store.submit(job())).is_new


async def test_a_closed_store_refuses(store):
    """As one that cannot be reached."""
    await store.close()

    with pytest.raises(Unavailable):
        await store.submit(job())
