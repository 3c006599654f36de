"""Jobs in the client, blocking and async, over gRPC and REST; and the commands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import structlog.testing

from splitserve.cli import jobs as commands
from splitserve.client import AsyncClient, Client
from splitserve.errors import Conflict, DeadlineExceeded, IdempotencyKeyReused, InvalidInput, NotFound
from splitserve.jobs.records import NewJob, Payload, new_id
from splitserve.jobs.sqlite import SqliteStore
from tests.jobs.whole import Whole, until, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROWS = {"x": [[1.0, 2.0], [3.0, 4.0]]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Whole]:
    async with whole(tmp_path_factory.mktemp("system")) as system:
        yield system


@pytest_asyncio.fixture(loop_scope="module", params=["grpc", "rest"])
async def url(request: pytest.FixtureRequest, system: Whole) -> str:
    return system.grpc_url if request.param == "grpc" else system.url


@contextlib.contextmanager
def closed(system: Whole):
    system.backend.gate.clear()
    try:
        yield
    finally:
        system.backend.gate.set()


async def blocking(url: str, act: Callable[[Client], Any]) -> Any:
    """Run something with the blocking client, in a thread."""

    def run() -> Any:
        with Client(url) as client:
            return act(client)

    return await asyncio.to_thread(run)


async def test_a_job_is_submitted_awaited_and_fetched(url):
    """Its answer is that of `infer`."""

    def act(client: Client):
        job = client.submit("echo", ROWS, version="1.1", priority=3, job_timeout_s=60, expires_s=60)
        before = (job.status, job.version, job.is_finished, job.error)
        return before, job.result(25), job, client.infer("echo", ROWS, version="1.1")

    before, answer, job, plain = await blocking(url, act)

    assert before == ("queued", "1.1", False, None)
    assert (answer.model, answer.version, job.status) == ("echo", "1.1", "succeeded")
    np.testing.assert_array_equal(answer["x"], plain["x"])
    assert job.info.priority == 3
    assert job.info.expires > job.info.created > 0
    assert job.info.finished >= job.info.started >= job.info.created
    assert job.id in repr(job)


async def test_the_async_client_does_the_same(url, system):
    """Awaited."""
    async with AsyncClient(url) as client:
        job = await client.submit("echo", ROWS)
        answer = await job.result(25)
        again = await client.job(job.id)
        listed = await client.jobs(model="echo", status="succeeded", limit=1)
        cancelled = await again.cancel()
        await again.remove()
        with pytest.raises(NotFound):
            await again.refresh()

    assert answer["x"].tolist() == ROWS["x"]
    assert [each.id for each in listed] == [job.id]
    assert cancelled.status == "succeeded"  # it had ended: cancelling changes nothing


async def test_waiting_ends_on_every_final_state(url, system):
    """Cancelled by another client; then removed by it."""
    with closed(system):
        async with AsyncClient(url) as client, AsyncClient(url) as other:
            job = await client.submit("echo", ROWS)
            waiting = asyncio.create_task(job.wait(25))
            await until(lambda: system.queue.n_waiting == 1)
            await (await other.job(job.id)).cancel()
            ended = await waiting
            with pytest.raises(Conflict):
                await job.result()
            second = await client.submit("echo", ROWS)
            waiting = asyncio.create_task(second.wait(25))
            await until(lambda: system.queue.n_waiting == 1)
            await (await other.job(second.id)).remove()
            with contextlib.suppress(NotFound):  # it may see the state between the two steps of the removal
                assert (await waiting).status == "cancelled"

    assert ended.status == "cancelled"


async def test_a_timeout_of_waiting_raises_and_the_job_goes_on(url, system):
    """It is the caller's, not the job's."""
    async with AsyncClient(url) as client:
        with closed(system):
            job = await client.submit("echo", ROWS)
            with pytest.raises(DeadlineExceeded, match=r"is still (queued|running) after 0\.05 s"):
                await job.wait(0.05)
        assert (await job.wait(25)).status == "succeeded"


async def test_a_failed_job_raises_its_error(url, system):
    """Of its class; the job has it too."""
    job_id = new_id()
    await system.queue._store.submit(
        NewJob(id=job_id, owner="", model="echo", version="1.1", request=Payload(b"\xff\xff not a message"))
    )
    async with AsyncClient(url) as client:
        job = await (await client.job(job_id)).wait(25)

        with pytest.raises(InvalidInput):
            await job.result()

    assert (job.status, type(job.error)) == ("failed", InvalidInput)


async def test_keys_make_submits_repeatable(url):
    """The same key with the same rows gives the same job, with others an error."""
    async with AsyncClient(url) as client:
        key = new_id()
        first = await client.submit("echo", ROWS, idempotency_key=key)
        second = await client.submit("echo", ROWS, idempotency_key=key)
        with pytest.raises(IdempotencyKeyReused):
            await client.submit("echo", {"x": [[9.0, 9.0]]}, idempotency_key=key)

    assert first.id == second.id


# Commands


@pytest.fixture
def caught_logs() -> Iterator[None]:
    """The services in this process do not write their logs into the output of the commands."""
    with structlog.testing.capture_logs():
        yield


async def test_the_commands_submit_list_show_fetch_and_cancel(system, capsys, caught_logs):
    """Each prints what the next one needs."""
    rows = json.dumps([[1.0, 2.0]])

    def submit(**options: Any) -> int:
        defaults = {"rows": rows, "url": system.grpc_url, "version": "", "options": {}, "is_awaited": False, "wait_s": None}
        return commands.submit("echo", None, **{**defaults, **options})

    awaited = await asyncio.to_thread(submit, is_awaited=True)
    answer = capsys.readouterr().out
    status = await asyncio.to_thread(submit)
    job_id = capsys.readouterr().out.split()[-1]
    shown = await asyncio.to_thread(commands.show, job_id, system.url, wait_s=25)
    text = capsys.readouterr().out
    job = json.loads(text)
    fetched = await asyncio.to_thread(commands.result, job_id, system.grpc_url, wait_s=25)
    table = capsys.readouterr().out
    cancelled = await asyncio.to_thread(commands.cancel, [job_id], system.grpc_url)
    listed = await asyncio.to_thread(commands.list_jobs, system.grpc_url, model="", status="succeeded", limit=5)
    text = capsys.readouterr().out
    unknown = await asyncio.to_thread(commands.result, new_id(), system.grpc_url, wait_s=None)
    some = await asyncio.to_thread(commands.cancel, [new_id(), job_id], system.grpc_url)
    some_cancelled = capsys.readouterr()

    assert [awaited, status, shown, fetched, cancelled, listed] == [0] * 6
    assert "echo 2.1" in answer
    assert "1 2" in answer
    assert (job["id"], job["status"]) == (job_id, "succeeded")
    assert "1 2" in table
    assert f"{job_id} succeeded" in text
    assert (unknown, some) == (1, 1)
    assert some_cancelled.err.count("there is no job") == 2
    assert f"{job_id} succeeded" in some_cancelled.out


@pytest.mark.parametrize(
    ("record", "message"),
    [({"y": [1.0, 2.0]}, 'instance 0: missing "x"'), ({"x": [1.0, 2.0], "y": 3.0}, 'instance 0: unknown "y", expected "x"')],
    ids=["missing", "unknown"],
)
async def test_the_command_submits_no_other_columns_than_the_models(system, capsys, record, message):
    """As ``splitserve infer``: a column that is forgotten or misspelled is an error, and no missing value."""
    options: dict[str, Any] = {"url": system.grpc_url, "version": "", "options": {}, "is_awaited": True, "wait_s": 25}
    status = await asyncio.to_thread(commands.submit, "echo", None, rows=json.dumps([record]), **options)

    assert status == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["nojson", "3", '[[1, "\\ud800"]]', "[" * 500 + "]" * 500])
async def test_rows_that_are_not_json_are_named_as_rows(system, capsys, rows):
    """The command's option, not the body of a request that nobody sent."""
    options: dict[str, Any] = {"url": system.grpc_url, "version": "", "options": {}, "is_awaited": True, "wait_s": 25}
    status = await asyncio.to_thread(commands.submit, "echo", None, rows=rows, **options)

    error = capsys.readouterr().err
    assert status == 1
    assert "--rows" in error
    assert "body" not in error


async def test_the_command_names_the_statuses_to_list(system, capsys):
    """Where it is asked for one that does not exist."""
    status = await asyncio.to_thread(commands.list_jobs, system.grpc_url, model="", status="done", limit=5)

    assert status == 1
    expected = 'status: expected one of queued, running, succeeded, failed, cancelled, got "done"'
    assert expected in capsys.readouterr().err


async def test_a_backup_has_every_job_that_was_acknowledged(tmp_path, capsys):
    """It is made while the service runs. Restored, it has those jobs and not what was written afterwards."""
    folder, copy = tmp_path / "jobs", tmp_path / "copy"
    store = SqliteStore(folder)
    store.open()
    (folder / "payloads").mkdir()
    (folder / "payloads" / "ref").write_bytes(b"large")
    submits = [NewJob(id=new_id(), owner="", model="m", version="1.1", request=Payload(b"r")) for _ in range(20)]
    for new in submits[:19]:
        await store.submit(new)

    assert commands.backup(folder, copy) == 0
    assert (copy / "jobs.sqlite").stat().st_mode & 0o777 == 0o600
    await store.submit(submits[19])
    assert commands.restore(folder, copy) == 1  # the service runs
    assert "stop it first" in capsys.readouterr().err
    await store.close()
    (folder / "payloads" / "ref").unlink()
    assert commands.restore(folder, copy) == 0

    again = SqliteStore(folder)
    again.open()
    found = {job.id for job in await again.list_jobs("", limit=100)}
    await again.close()
    assert found == {new.id for new in submits[:19]}
    assert (folder / "payloads" / "ref").read_bytes() == b"large"


async def test_a_backup_without_its_payloads_says_so(tmp_path, capsys):
    """They are in a bucket, or in another folder."""
    store = SqliteStore(tmp_path / "jobs")
    store.open()
    for ref in ("here", "elsewhere"):
        await store.submit(NewJob(id=new_id(), owner="", model="m", version="1.1", request=Payload(ref=ref)))
    await store.close()
    (tmp_path / "jobs" / "payloads").mkdir()
    (tmp_path / "jobs" / "payloads" / "here").touch()

    assert commands.backup(tmp_path / "jobs", tmp_path / "copy") == 0
    assert "1 payloads that jobs name are not in" in capsys.readouterr().err


async def test_a_backup_has_the_requests_of_jobs_that_end_meanwhile(tmp_path, capsys, monkeypatch):
    """Restored, they are queued again: their requests are needed."""
    store = SqliteStore(tmp_path / "jobs")
    store.open()
    await store.submit(NewJob(id=new_id(), owner="", model="m", version="1.1", request=Payload(ref="ref")))
    payload = tmp_path / "jobs" / "payloads" / "ref"
    payload.parent.mkdir()
    payload.write_bytes(b"request")
    connect = sqlite3.connect

    def connect_late(*arguments, **options):
        payload.unlink(missing_ok=True)
        return connect(*arguments, **options)

    monkeypatch.setattr(commands.sqlite3, "connect", connect_late)

    assert commands.backup(tmp_path / "jobs", tmp_path / "copy") == 0

    assert (tmp_path / "copy" / "payloads" / "ref").read_bytes() == b"request"
    await store.close()


async def test_a_backup_is_not_written_over_another(tmp_path, capsys):
    """Nor made of what is none."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()

    assert commands.backup(tmp_path / "nothing", tmp_path / "copy") == 1
    assert commands.backup(tmp_path / "nothing", tmp_path / "full") == 1
    assert commands.restore(tmp_path / "jobs", Path(tmp_path / "full")) == 1
    assert "expected a backup" in capsys.readouterr().err
