"""Whose jobs they are: owners, rights, and what is refused without a jobs service or without credentials."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from jobs_service import build
from jobs_service.settings import JobsSettings, check
from proxy.jobs import ProxyJobs
from splitserve.api.splitserve.jobs.v1 import jobs_pb2 as pb
from splitserve.errors import InvalidInput, PermissionDenied
from splitserve.jobs.protobuf import CALLER_KEY, decode_caller, encode_caller
from splitserve.jobs.records import JobCaller, new_id
from splitserve.oip.limits import RequestLimits
from splitserve.server import settings
from splitserve.server.callers import Caller, current
from splitserve.testing import FakeInference
from tests.contracts.faces import served
from tests.jobs.whole import body, until, whole

ROW = ((1.0, 2.0),)


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def write_policy(folder: Path, **models: list[str]) -> str:
    tokens = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "models": patterns}
        for name, patterns in models.items()
    ]
    file = folder / "auth.json"
    file.write_text(json.dumps({"tokens": tokens}))
    return str(file)


@pytest.fixture(params=["split", "fused"])
async def system(request: pytest.FixtureRequest, tmp_path: Path):
    (tmp_path / "token").write_text("worker\n")
    policy = write_policy(tmp_path, ann=["echo"], bob=["echo", "identity_*"], worker=["*"])
    async with whole(
        tmp_path,
        is_fused=request.param == "fused",
        auth_file=policy,
        refresh_interval_s=0.05,
        jobs={"proxy_token_file": str(tmp_path / "token")},
    ) as system:
        yield system


async def test_a_job_is_its_owners(system):
    """The jobs service answers it with a credential of its own; to another caller it does not exist."""
    job = await system.submitted(headers=as_("ann"))

    assert (await system.ended(job, headers=as_("ann")))["status"] == "succeeded"
    assert (await system.rest.get(job["urls"]["result"], headers=as_("ann"))).status_code == 200
    for method, url in (("GET", job["urls"]["self"]), ("GET", job["urls"]["result"]), ("DELETE", job["urls"]["self"])):
        assert (await system.rest.request(method, url, headers=as_("bob"))).status_code == 404
        assert (await system.rest.request(method, url)).status_code == 401
    assert (await system.rest.get("/v2/jobs", headers=as_("bob"))).json() == {"jobs": []}
    assert len((await system.rest.get("/v2/jobs", headers=as_("ann"))).json()["jobs"]) == 1


async def test_rights_are_checked_at_submit_and_at_the_result(system, tmp_path):
    """By what the authorization file says at that time."""
    refused = await system.rest.post("/v2/models/identity_fp32/jobs", json=body(ROW), headers=as_("ann"))
    job = await system.submitted("identity_fp32", headers=as_("bob"))
    await system.ended(job, headers=as_("bob"))
    before = await system.rest.get(job["urls"]["result"], headers=as_("bob"))
    write_policy(tmp_path, ann=["echo"], bob=["echo"], worker=["*"])
    while (await system.rest.get("/v2/models/identity_fp32", headers=as_("bob"))).status_code == 200:
        pass

    after = await system.rest.get(job["urls"]["result"], headers=as_("bob"))

    assert (refused.status_code, before.status_code, after.status_code) == (403, 200, 403)


@pytest.mark.parametrize("rights", [{"bob": ["echo"]}, {}])
async def test_rights_are_checked_when_the_job_runs(system, tmp_path, rights):
    """By what the authorization file says then: what was taken from the caller, or the caller itself, is not used any more."""
    system.queue.worker._is_draining = True
    job = await system.submitted("identity_fp32", headers=as_("bob"))
    write_policy(tmp_path, ann=["*"], worker=["*"], **rights)
    while (await system.rest.get("/v2/models/identity_fp32", headers=as_("bob"))).status_code == 200:
        pass
    system.queue.worker._is_draining = False
    system.queue.worker.wake()

    found = await system.queue.get(JobCaller("bob", ()), job["id"], 25)

    assert found.status == "failed", found
    assert found.error.reason == "PERMISSION_DENIED"
    assert system.backend.requests == []


async def test_the_worker_learns_which_models_can_be_merged(system):
    """It is let in: with its token, or because it is in the proxy's process."""
    await system.submitted(headers=as_("ann"))

    await until(lambda: system.queue.worker._mergeable == {("echo", "2.1"): True})


async def test_credentials_are_not_stored(system, tmp_path):
    """Neither the token nor its digest is in any file of the jobs."""
    await system.submitted(headers=as_("ann"))
    stored = b"".join(path.read_bytes() for path in (tmp_path / "jobs").rglob("*") if path.is_file())

    assert b"Bearer" not in stored
    assert hashlib.sha256(b"ann").hexdigest().encode() not in stored


async def test_a_caller_that_nothing_tells_apart_has_no_jobs():
    """They would be those of all others like it, e.g. of all bearers of a JWT without a subject."""
    jobs = ProxyJobs(None, object(), RequestLimits(), is_authenticated=True)
    current.set(Caller("jwt", ("*",)))

    with pytest.raises(PermissionDenied, match="sub"):
        await jobs.get(new_id())


async def test_a_caller_cannot_name_itself(system):
    """The metadata that says who calls is set by the proxy; over its own faces it means nothing."""
    job = await system.submitted(headers=as_("ann"))
    request = pb.GetJobRequest(id=job["id"])
    forged = ((CALLER_KEY, json.dumps({"name": "ann", "models": ["*"]})), ("authorization", "Bearer bob"))

    with pytest.raises(Exception, match="there is no job"):
        await system.call("GetJob", request, metadata=forged)


async def test_without_a_jobs_service_jobs_are_not_supported():
    """501, which names the setting, on every path and over gRPC; the document does not have them."""
    async with served() as system:
        answers = [
            await system.rest.post("/v2/models/echo/jobs", json=body(ROW)),
            await system.rest.post("/v2/models/echo/infer", json=body(ROW), headers={"Prefer": "respond-async"}),
            await system.rest.get("/v2/jobs"),
            await system.rest.get("/v2/jobs/x"),
            await system.rest.get("/v2/jobs/x/result"),
            await system.rest.delete("/v2/jobs/x"),
        ]
        document = (await system.rest.get("/openapi.json")).json()

    assert {answer.status_code for answer in answers} == {501}
    assert all("PROXY_JOBS_TARGET" in answer.json()["error"] for answer in answers)
    assert not [path for path in document["paths"] if "jobs" in path]


async def test_a_proxy_in_a_network_lists_no_jobs_of_callers_it_does_not_know(tmp_path):
    """All callers are one there, and would see each other's."""
    async with whole(tmp_path, host="0.0.0.0") as system:
        job = await system.submitted()
        listed = await system.rest.get("/v2/jobs")
        seen = await system.rest.get(job["urls"]["self"])

    assert (listed.status_code, seen.status_code) == (403, 200)


def test_the_service_listens_beyond_loopback_with_mutual_tls_only(capsys):
    """Whoever reaches its port says who calls."""
    with pytest.raises(SystemExit):
        check(JobsSettings(host="0.0.0.0"))

    assert "JOBS_HOST" in capsys.readouterr().err
    check(JobsSettings())


def test_several_processes_cannot_share_a_folder(capsys):
    """They can share a database."""
    with pytest.raises(SystemExit):
        check(JobsSettings(workers=2))

    assert "JOBS_DATABASE_URL" in capsys.readouterr().err
    check(JobsSettings(workers=2, database_url="postgresql://localhost/x"))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("JOBS_DATABASE_URL", "secret", "expected postgresql://"),
        ("JOBS_DATABASE_DIRECT_URL", "postgresql://ann:secret@host:nope/x?y=z", "expected postgresql://"),
        ("JOBS_PAYLOADS", "s4://bucket", "s4"),
        ("JOBS_WEBHOOK_SECRETS_FILE", "/nowhere", "/nowhere"),
        ("JOBS_PROXY_TOKEN_FILE", "/nowhere", "/nowhere"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(monkeypatch, capsys, name, value, expected):
    """Before anything listens, and without the password that it may have."""
    monkeypatch.setenv(name, value)

    with pytest.raises(SystemExit):
        settings.read(JobsSettings)

    error = capsys.readouterr().err
    assert error.startswith(f"{name}: ")
    assert expected in error
    assert "secret" not in error


async def test_a_place_of_payloads_that_cannot_be_made_is_named(tmp_path, capsys):
    """As a folder of jobs that cannot be used."""
    (tmp_path / "file").touch()

    with pytest.raises(SystemExit):
        async with build(FakeInference(), JobsSettings(dir=str(tmp_path / "jobs"), payloads=str(tmp_path / "file" / "x"))):
            pass

    assert "JOBS_PAYLOADS: " in capsys.readouterr().err


@pytest.mark.parametrize("caller", [JobCaller(), JobCaller("Ånn \N{SNOWMAN}", ("a-*", "b")), JobCaller("x", ())])
def test_callers_cross_as_metadata(caller):
    """With any name, in ASCII."""
    metadata = encode_caller(caller)

    assert decode_caller(metadata) == caller
    assert all(value.isascii() for _, value in metadata)


@pytest.mark.parametrize("value", ["", "x", "[]", '{"name": "ann"}', '{"models": []}'])
def test_a_malformed_caller_is_not_taken_for_none(value):
    """It would own what callers without credentials own."""
    with pytest.raises(InvalidInput):
        decode_caller(((CALLER_KEY, value),))
