"""Jobs through the proxy's REST face, with the jobs service behind it, and in one process with it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import pytest_asyncio

from proxy import jobs as proxy_jobs
from proxy import remote_jobs
from splitserve.errors import InvalidInput, NotFound, Unavailable
from splitserve.jobs.records import new_id
from tests.jobs.whole import Whole, body, until, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROW = ((1.0, 2.0),)
UNKNOWN_ID = "0" * 32


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["split", "fused"])
async def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Whole]:
    async with whole(tmp_path_factory.mktemp("system"), is_fused=request.param == "fused") as system:
        yield system


@pytest_asyncio.fixture(loop_scope="module")
async def closed(system: Whole) -> AsyncIterator[Whole]:
    """Jobs are not answered before the test opens the gate."""
    system.backend.gate.clear()
    yield system
    system.backend.gate.set()


# Submitting


async def test_a_submitted_job_is_answered_later(system):
    """202 with where it is and when to look; its result is what the inference would have been."""
    plain = await system.rest.post("/v2/models/echo/infer", json=body(ROW))
    response = await system.rest.post("/v2/models/echo/jobs", json=body(ROW))
    job = response.json()

    ended = await system.ended(job)
    result = await system.rest.get(job["urls"]["result"])

    assert response.status_code == 202
    assert response.headers["location"] == f"/v2/jobs/{job['id']}" == job["urls"]["self"]
    assert response.headers["retry-after"] == "1"
    assert (job["status"], job["model"], job["version"], job["error"]) == ("queued", "echo", "2.1", None)
    assert (ended["status"], ended["attempt"]) == ("succeeded", 1)
    assert ended["created"] <= ended["started"] <= ended["finished"]
    assert (result.status_code, result.json()) == (200, plain.json())


@pytest.mark.parametrize("prefer", ["respond-async", "Respond-Async; x, wait=10", "return=minimal, respond-async"])
@pytest.mark.parametrize("path", ["/v2/models/echo/infer", "/v2/models/echo/versions/1.1/infer"])
async def test_an_inference_that_prefers_it_is_a_job(system, prefer, path):
    """RFC 7240: the response says that the preference was applied."""
    response = await system.rest.post(path, json=body(ROW), headers={"Prefer": prefer})

    assert response.status_code == 202
    assert response.headers["preference-applied"] == "respond-async"
    assert response.json()["version"] == ("1.1" if "versions" in path else "2.1")


async def test_other_preferences_leave_an_inference_as_it_is(system):
    """They may be ignored."""
    response = await system.rest.post("/v2/models/echo/infer", json=body(ROW), headers={"Prefer": "return=minimal"})

    assert response.status_code == 200


@pytest.mark.parametrize("content", [{"instances": [[1.0, 2.0]]}, {"inputs": [[1.0, 2.0]]}])
async def test_a_v1_request_has_a_v1_result(system, content):
    """Of rows or of columns, as the inference would have been answered."""
    plain = await system.rest.post("/v1/models/echo:predict", json=content)
    job = (await system.rest.post("/v1/models/echo:predict", json=content, headers={"Prefer": "respond-async"})).json()
    await system.ended(job)

    result = await system.rest.get(job["urls"]["result"])

    assert result.json() == plain.json()


async def test_binary_tensors_are_sent_and_returned(system):
    """As for an inference: the request says in which form outputs are wanted."""
    head = json.dumps(
        {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
            "outputs": [{"name": "x", "parameters": {"binary_data": True}}],
        }
    ).encode()
    raw = b"\0\0\x80\x3f\0\0\0\x40"
    headers = {"Inference-Header-Content-Length": str(len(head))}
    job = (await system.rest.post("/v2/models/echo/jobs", content=head + raw, headers=headers)).json()
    await system.ended(job)

    result = await system.rest.get(job["urls"]["result"])

    assert result.headers["content-type"] == "application/octet-stream"
    assert result.content.endswith(raw)
    assert int(result.headers["inference-header-content-length"]) == len(result.content) - len(raw)


async def test_whatever_can_be_answered_at_once_can_be_a_job(tmp_path):
    """A job's message has more in it than the request, and that of its result more than the answer."""
    limit = 100_000
    outputs = [{"name": "x", "parameters": {"binary_data": True, "note": "n" * 20_000}}]
    inputs: list[dict[str, Any]] = [{"name": "x", "datatype": "FP32", "shape": [9_800, 2]}]
    inputs[0]["parameters"] = {"binary_data_size": 9_800 * 8}
    head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    content = head + bytes(9_800 * 8)
    headers = {"Inference-Header-Content-Length": str(len(head)), "Idempotency-Key": "k" * 255}
    async with whole(tmp_path, jobs={"max_message_bytes": limit}, max_message_bytes=limit) as system:
        plain = await system.rest.post("/v2/models/echo/infer", content=content, headers=headers)
        job = await system.rest.post("/v2/models/echo/jobs", content=content, headers=headers)
        await system.ended(job.json())
        result = await system.rest.get(job.json()["urls"]["result"])

    assert len(content) < limit
    assert (plain.status_code, job.status_code, result.status_code) == (200, 202, 200)
    assert result.content == plain.content


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v2/models/echo/jobs", {"inputs": []}, 400),
        ("/v2/models/nope/jobs", body(ROW), 404),
        ("/v2/models/echo/versions/9.9/jobs", body(ROW), 404),
        ("/v2/models/echo/jobs?priority=10", body(ROW), 400),
        ("/v2/models/echo/jobs?timeout=abc", body(ROW), 400),
        ("/v2/models/echo/jobs?timeout=301", body(ROW), 400),
        ("/v2/models/echo/jobs?timeout=1&timeout=2", body(ROW), 400),
        ("/v2/models/echo/jobs?unknown=1", body(ROW), 400),
        ("/v2/models/echo/jobs?priority=0", body(ROW), 400),
        ("/v2/models/echo/jobs?timeout=0", body(ROW), 400),
        ("/v2/models/echo/jobs?expires=0.0", body(ROW), 400),
        ("/v2/models/echo/jobs?priority=", body(ROW), 400),
        ("/v2/models/echo/jobs?webhook=", body(ROW), 400),
        ("/v2/models/echo/jobs?webhook_events=job.failed", body(ROW), 400),
        ("/v2/models/echo/jobs?webhook=https://example.org/", body(ROW), 400),
        ("/v2/models/echo/jobs?webhook=https://example.org/&webhook_events=job.nope", body(ROW), 400),
    ],
)
async def test_what_cannot_be_run_is_refused_at_submit(system, path, content, status):
    """With the error that the inference would have had; nothing is stored."""
    for job in (await system.rest.get("/v2/jobs")).json()["jobs"]:  # those of other tests change until they end
        await system.ended(job)
    before = (await system.rest.get("/v2/jobs")).json()

    response = await system.rest.post(path, json=content)

    assert response.status_code == status, response.text
    assert (await system.rest.get("/v2/jobs")).json() == before


async def test_a_short_deadline_of_the_submit_does_not_bound_the_job(closed):
    """It bounds the submit only."""
    job = await closed.submitted(headers={"Request-Timeout": "0.2"})
    await asyncio.sleep(0.3)
    closed.backend.gate.set()

    assert (await closed.ended(job))["status"] == "succeeded"


@pytest.mark.parametrize("verb", ["submit", "result", "delete", "list_jobs"])
async def test_a_call_ends_in_its_own_time(system, monkeypatch, verb):
    """Not in that of the jobs service, which gives it up too. Of a submit nobody knows whether it stored a job."""
    was_given_up = asyncio.Event()

    async def hang(*arguments: Any, **options: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            was_given_up.set()

    monkeypatch.setattr(remote_jobs, "CALL_TIMEOUT_S", 3600)
    monkeypatch.setattr(system.queue._store, verb, hang)
    method, path = {
        "submit": ("POST", "/v2/models/echo/jobs"),
        "result": ("GET", f"/v2/jobs/{UNKNOWN_ID}/result"),
        "delete": ("DELETE", f"/v2/jobs/{UNKNOWN_ID}"),
        "list_jobs": ("GET", "/v2/jobs"),
    }[verb]

    response = await system.rest.request(method, path, json=body(ROW), headers={"Request-Timeout": "0.2"})

    assert (response.status_code, response.json()["reason"]) == (504, "DEADLINE_EXCEEDED")
    assert ("Idempotency-Key" in response.json()["error"]) == (verb == "submit")
    async with asyncio.timeout(30):
        await was_given_up.wait()


# Looking, waiting, fetching


async def test_a_call_that_waits_ends_in_its_own_time(closed, monkeypatch):
    """With the job as it is, before its time is over."""
    job = await closed.submitted()
    waits, get = [], closed.queue.get

    async def recorded(caller: Any, job_id: str, wait_s: float = 0.0) -> Any:
        waits.append(wait_s)
        return await get(caller, job_id)

    monkeypatch.setattr(closed.queue, "get", recorded)

    response = await closed.rest.get(job["urls"]["self"], params={"wait": "30"}, headers={"Request-Timeout": "20"})

    assert (response.status_code, response.json()["id"]) == (200, job["id"])
    assert 0 < waits[0] < 20


async def test_callers_that_wait_leave_room_for_others(tmp_path, monkeypatch):
    """Each takes a call to the jobs service; where many wait already, one more is answered at once."""
    monkeypatch.setattr(proxy_jobs, "MAX_WAITING", 4)
    async with whole(tmp_path, jobs={"max_streams": 6}) as system:
        system.backend.gate.clear()
        job = await system.submitted()
        waiting = [asyncio.create_task(system.rest.get(job["urls"]["self"], params={"wait": "25"})) for _ in range(12)]
        await until(lambda: sum(task.done() for task in waiting) == 8)

        other = await system.submitted()
        system.backend.gate.set()
        answers = [await task for task in waiting]
        ended = await system.ended(other)

    assert {answer.status_code for answer in answers} == {200}
    assert [answer.json()["status"] for answer in answers].count("succeeded") == 4
    assert ended["status"] == "succeeded"


async def test_a_result_that_is_not_there_yet_is_a_conflict(closed):
    """409, with when to look again."""
    job = await closed.submitted()

    response = await closed.rest.get(job["urls"]["result"])

    assert (response.status_code, response.json()["reason"]) == (409, "NOT_FINISHED")
    assert response.headers["retry-after"] == "1"


async def test_waiting_ends_with_the_job(closed):
    """Not with the time to wait."""
    job = await closed.submitted()
    waiting = asyncio.create_task(closed.rest.get(job["urls"]["self"], params={"wait": "25"}))
    await until(lambda: closed.queue.n_waiting == 1)
    closed.backend.gate.set()
    response = await waiting

    assert response.json()["status"] == "succeeded"
    assert closed.queue.n_waiting == 0


async def test_new_certificates_end_no_waiting_and_delay_no_call(tmp_path, monkeypatch):
    """The proxy calls the jobs service on a new connection, and those that are under way end on the old one."""
    changes = iter([True])
    certificates = SimpleNamespace(has_changed=lambda: next(changes, False), value=None)
    monkeypatch.setattr(grpc.aio, "secure_channel", lambda target, _, options: grpc.aio.insecure_channel(target, options))
    async with whole(tmp_path) as system:
        system.backend.gate.clear()
        job = await system.submitted()
        waiting = asyncio.create_task(system.rest.get(job["urls"]["self"], params={"wait": "25"}))
        await until(lambda: system.queue.n_waiting == 1)

        monkeypatch.setattr(system.faces._jobs._given, "_files", certificates)
        other = await system.submitted()
        system.backend.gate.set()
        ended = await system.ended(other)
        waited = await waiting

    assert next(changes, None) is None
    assert (ended["status"], waited.status_code, waited.json()["status"]) == ("succeeded", 200, "succeeded")


async def test_waiting_for_too_long_ends_with_the_job_as_it_is(closed):
    """200, and when to look again."""
    job = await closed.submitted()

    response = await closed.rest.get(job["urls"]["self"], params={"wait": "0.05"})

    assert (response.status_code, response.headers["retry-after"]) == (200, "1")
    assert response.json()["status"] in ("queued", "running")


async def test_callers_that_leave_are_not_waited_for(closed):
    """Nothing of them is left behind."""
    job = await closed.submitted()
    waiting = [asyncio.create_task(closed.rest.get(job["urls"]["self"], params={"wait": "25"})) for _ in range(20)]
    await until(lambda: closed.queue.n_waiting == 20)

    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)

    await until(lambda: closed.queue.n_waiting == 0)


@pytest.mark.parametrize("wait", ["-1", "abc", "1e3", ""])
async def test_a_wait_is_a_number(system, wait):
    """Of seconds."""
    response = await system.rest.get(f"/v2/jobs/{new_id()}", params={"wait": wait})

    assert response.status_code == 400


@pytest.mark.parametrize("job", ["0123456789abcdef" * 2, "nope", "..%2f..%2fetc", "%00", "A" * 32, "a" * 5000])
async def test_an_unknown_job_is_not_found(system, job):
    """Whatever its name looks like."""
    for method, path in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
        response = await system.rest.request(method, f"/v2/jobs/{job}{path}")
        assert response.status_code == 404


async def test_a_failed_job_has_the_status_of_its_error(system):
    """At its result; the job itself says it in its error."""
    job = await system.submitted("weird")  # its answer has no JSON form: that is found when the result is fetched
    await system.ended(job)

    assert (await system.rest.get(job["urls"]["result"])).status_code == 400


# Cancelling


async def test_a_queued_job_is_cancelled(closed):
    """Its result is a conflict from then on; deleting it again removes it."""
    closed.queue.worker._is_draining = True
    try:
        job = await closed.submitted()
        cancelled = await closed.rest.delete(job["urls"]["self"])
        result = await closed.rest.get(job["urls"]["result"])
        removed = await closed.rest.delete(job["urls"]["self"])
        gone = await closed.rest.get(job["urls"]["self"])
    finally:
        closed.queue.worker._is_draining = False

    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert (result.status_code, result.json()["reason"]) == (409, "CONFLICT")
    assert "retry-after" not in result.headers
    assert (removed.json()["status"], gone.status_code) == ("cancelled", 404)


async def test_a_running_job_is_cancelled(closed):
    """Whoever waits for it is told at once, and it stays cancelled."""
    job = await closed.submitted()
    await until(lambda: job["id"] in [lease.id for lease in closed.queue.worker._running])
    waiting = asyncio.create_task(closed.rest.get(job["urls"]["self"], params={"wait": "25"}))
    await until(lambda: closed.queue.n_waiting == 1)

    cancelled = await closed.rest.delete(job["urls"]["self"])
    seen = (await waiting).json()

    assert cancelled.json()["status"] == seen["status"] == "cancelled"
    closed.backend.gate.set()
    assert (await closed.rest.get(job["urls"]["self"])).json()["status"] == "cancelled"


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
async def test_rows_of_a_running_job_that_wait_at_the_proxy_are_not_sent(tmp_path, is_fused):
    """It was sent to the proxy, which waits for a call to end: the job leaves that queue too."""
    async with whole(tmp_path, is_fused=is_fused) as system:
        system.backend.gate.clear()
        first = await system.submitted()
        await until(lambda: system.service.batcher.occupancy("echo") == (0, 1))
        second = await system.submitted(rows=((5.0, 6.0),))
        await until(lambda: system.service.batcher.occupancy("echo") == (1, 1))

        cancelled = await system.rest.delete(second["urls"]["self"])
        await until(lambda: system.service.batcher.occupancy("echo") == (0, 1))
        system.backend.gate.set()
        await system.ended(first)

    assert cancelled.json()["status"] == "cancelled"
    assert len(system.backend.requests) == 1


async def test_a_job_that_has_ended_is_kept_if_only_a_cancel_was_asked_for(system):
    """Its result may have come just before."""
    job = await system.submitted()
    await system.ended(job)

    kept = await system.rest.delete(job["urls"]["self"], params={"keep_ended": "true"})
    result = await system.rest.get(job["urls"]["result"])
    unclear = await system.rest.delete(job["urls"]["self"], params={"keep_ended": "1"})
    removed = await system.rest.delete(job["urls"]["self"], params={"keep_ended": "false"})
    gone = await system.rest.get(job["urls"]["self"])

    assert [each.status_code for each in (kept, result, unclear, removed, gone)] == [200, 200, 400, 200, 404]
    assert kept.json()["status"] == "succeeded"


async def test_a_proxy_that_stops_keeps_nobody_waiting(tmp_path):
    """It answers with the job as it is."""
    async with whole(tmp_path) as system:
        system.backend.gate.clear()
        job = await system.submitted()
        waiting = asyncio.create_task(system.rest.get(job["urls"]["self"], params={"wait": "25"}))
        await until(lambda: system.queue.n_waiting == 1)

        async with asyncio.timeout(20):
            await system.faces.drain()

        assert (await waiting).json()["id"] == job["id"]
        system.backend.gate.set()


# Lists


async def test_jobs_are_listed_by_model_and_status_in_pages(system):
    """The newest first."""
    jobs = [await system.submitted("identity_fp32") for _ in range(3)]
    for job in jobs:
        await system.ended(job)

    found = (await system.rest.get("/v2/jobs?model=identity_fp32&status=succeeded&limit=2")).json()["jobs"]
    rest = (await system.rest.get(f"/v2/jobs?model=identity_fp32&after={found[-1]['id']}")).json()["jobs"]

    assert [job["id"] for job in (*found, *rest)] == [job["id"] for job in reversed(jobs)]


@pytest.mark.parametrize(
    "query", ["status=nope", "limit=abc", "limit=1001", "limit=0", "limit=-1", "after=nope", f"after={UNKNOWN_ID}", "what=1"]
)
async def test_a_list_with_a_wrong_filter_is_refused(system, query):
    """Rather than answered with other jobs, or with none as if there were no more."""
    response = await system.rest.get(f"/v2/jobs?{query}")

    assert response.status_code == 400
    assert query.partition("=")[0] in response.json()["error"]


@pytest.mark.parametrize("path", ["/v2/models/echo/infer", "/v1/models/echo:predict"])
@pytest.mark.parametrize("options", ["priority=1", "x=1&expires=5", "webhook="])
async def test_options_of_a_job_are_refused_where_none_was_asked_for(system, path, options):
    """The header was forgotten. Parameters that nobody knows are ignored."""
    content = body(ROW) if "v2" in path else {"instances": [[1.0, 2.0]]}

    refused = await system.rest.post(f"{path}?{options}", json=content)
    answered = await system.rest.post(f"{path}?x=1", json=content)

    assert (refused.status_code, answered.status_code) == (400, 200)
    assert "Prefer: respond-async" in refused.json()["error"]


async def test_counters_are_there_for_metrics(closed):
    """Of the store as of the last count, and of this process."""
    before = closed.queue.counters()
    jobs = [await closed.submitted() for _ in range(2)]
    await until(lambda: closed.queue.counters().in_flight == 2)
    await closed.queue._sweep()
    running = closed.queue.counters()
    closed.backend.gate.set()
    for job in jobs:
        await closed.ended(job)
    await until(lambda: closed.queue.counters().in_flight == 0)
    await closed.queue._sweep()
    after = closed.queue.counters()

    assert (running.queued, running.running, running.attempts - before.attempts) == (0, 2, 2)
    assert (after.running, after.oldest_queued_s, after.outbox, after.window > 0) == (0, 0.0, 0, True)


# Idempotency keys


async def submit_with_key(system: Whole, key: str, **changes: Any) -> Any:
    request = {"url": "/v2/models/echo/jobs", "json": body(ROW), **changes}
    request["headers"] = {"Idempotency-Key": key, **request.get("headers", {})}
    return await system.rest.post(**request)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 202),
        ({"url": "/v2/models/echo/infer", "headers": {"Prefer": "respond-async"}}, 202),  # another way to say the same
        ({"headers": {"Request-Timeout": "7", "User-Agent": "other"}}, 202),  # not part of what is asked
        ({"json": body(((1.0, 3.0),))}, 422),
        ({"url": "/v2/models/identity_fp32/jobs"}, 422),
        ({"url": "/v2/models/echo/versions/2.1/jobs"}, 422),
        ({"url": "/v2/models/echo/jobs?priority=1"}, 422),
        ({"url": "/v2/models/echo/jobs?timeout=7"}, 422),
        ({"url": "/v1/models/echo:predict", "headers": {"Prefer": "respond-async"}, "json": {"instances": [[1.0, 2.0]]}}, 422),
        ({"json": {"inputs": []}}, 400),
    ],
)
async def test_a_key_belongs_to_one_request(system, changes, status):
    """The same request gives the same job, another one 422, one that is wrong by itself its own error."""
    key = new_id()
    first = await submit_with_key(system, key)

    second = await submit_with_key(system, key, **changes)

    assert second.status_code == status, second.text
    if status == 202:
        assert second.headers["location"] == first.headers["location"]


async def test_a_key_may_be_quoted(system):
    """A string of RFC 8941, as the draft says, or bare text, as most clients send it."""
    key = new_id()

    first, second = await submit_with_key(system, f'"{key}"'), await submit_with_key(system, key)

    assert first.json()["id"] == second.json()["id"]


async def test_a_refused_submit_leaves_no_key(system):
    """The same key with a request that is right stores a job."""
    key = new_id()
    refused = await submit_with_key(system, key, url="/v2/models/nope/jobs")

    accepted = await submit_with_key(system, key)

    assert (refused.status_code, accepted.status_code) == (404, 202)


async def test_a_caller_has_a_limited_number_of_jobs(tmp_path):
    """429 beyond it, with a new key too; a key that is known gives its job. Jobs that have ended do not count."""
    async with whole(tmp_path, jobs={"max_jobs_per_caller": 2}) as system:
        system.backend.gate.clear()
        first, second = new_id(), new_id()
        jobs = [await submit_with_key(system, key) for key in (first, second)]
        refused = [await system.rest.post("/v2/models/echo/jobs", json=body(ROW)), await submit_with_key(system, new_id())]
        known = await submit_with_key(system, first)
        system.backend.gate.set()
        for each in jobs:
            await system.ended(each.json())
        await system.queue._sweep()
        again = await submit_with_key(system, new_id())

    assert [each.status_code for each in (*jobs, *refused, known, again)] == [202, 202, 429, 429, 202, 202]
    assert known.json()["id"] == jobs[0].json()["id"]
    assert "JOBS_MAX_JOBS_PER_CALLER" in refused[0].json()["error"]


async def test_a_full_disk_refuses_submits_only(system, monkeypatch):
    """507, without taking the key; states, results, DELETE and the sweep work on, and submits as soon as there is space."""
    kept, removed, key = await system.submitted(), await system.submitted(), new_id()
    stored = await submit_with_key(system, old := new_id())
    for job in (kept, removed):
        await system.ended(job)
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    refused = await submit_with_key(system, key)
    known = await submit_with_key(system, old)
    found = await system.rest.get(kept["urls"]["self"])
    result = await system.rest.get(kept["urls"]["result"])
    deleted = await system.rest.delete(removed["urls"]["self"])
    await system.queue._sweep()
    usage.free = 10**12
    accepted = await submit_with_key(system, key)

    assert refused.status_code == 507
    assert known.json()["id"] == stored.json()["id"]
    assert "full" in refused.json()["error"]
    assert [each.status_code for each in (found, result, deleted, accepted)] == [200, 200, 200, 202]


async def test_a_key_whose_job_was_removed_is_gone(system):
    """410: the work is not done again."""
    key = new_id()
    job = (await submit_with_key(system, key)).json()
    await system.ended(job)
    await system.rest.delete(job["urls"]["self"])

    assert (await submit_with_key(system, key)).status_code == 410


@pytest.mark.parametrize("refusal", [InvalidInput("shape"), NotFound("no such version"), Unavailable("loading")])
async def test_a_key_gives_its_job_although_its_request_would_be_refused_now(system, monkeypatch, refusal):
    """Another release serves, or none. What is new, or another request, is refused as it is without a key."""

    def refuse(_: Any) -> None:
        raise refusal

    key, expected = new_id(), refusal.http_status
    first = await submit_with_key(system, key)
    await system.ended(first.json())
    monkeypatch.setattr(system.service, "bind", refuse)

    again = await submit_with_key(system, key)
    others = [await submit_with_key(system, key, json=body(((7.0, 7.0),))), await submit_with_key(system, new_id())]
    await system.rest.delete(first.json()["urls"]["self"])
    gone = await submit_with_key(system, key)

    assert (again.status_code, again.headers["location"]) == (202, first.headers["location"])
    assert [other.status_code for other in others] == [expected, expected]
    assert gone.status_code == 410


async def test_a_key_gives_its_job_although_other_limits_are_in_force(tmp_path):
    """The service was restarted with a smaller timeout."""
    key = new_id()
    async with whole(tmp_path) as system:
        first = await submit_with_key(system, key, url="/v2/models/echo/jobs?timeout=200")
    async with whole(tmp_path, jobs={"max_timeout_s": 100}) as system:
        again = await submit_with_key(system, key, url="/v2/models/echo/jobs?timeout=200")
        new = await submit_with_key(system, new_id(), url="/v2/models/echo/jobs?timeout=200")

    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert new.status_code == 400


async def test_a_key_sent_at_once_by_many_makes_one_job(system):
    """All are answered with the same location."""
    key = new_id()

    answers = await asyncio.gather(*[submit_with_key(system, key) for _ in range(30)])

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.headers["location"] for answer in answers}) == 1


@pytest.mark.parametrize("key", ["", '""', "k" * 256])
async def test_a_key_that_is_none_is_refused(system, key):
    """Empty, or too long."""
    assert (await submit_with_key(system, key)).status_code == 400
