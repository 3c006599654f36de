"""Traces of jobs: from the submission to the execution, with the jobs service behind the proxy and in one process with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from splitserve.api.splitserve.jobs.v1 import jobs_pb2 as pb
from splitserve.jobs.protobuf import SERVICE
from splitserve.jobs.records import JobCaller
from splitserve.telemetry.traces import Sampler
from tests.jobs.whole import Whole, body, until, whole
from tests.telemetry.traced import CALLER, NOT_SAMPLED, SAMPLED, TRACE, tracing

SUBMIT = "POST /v2/models/{model}/jobs"


@pytest.fixture(params=["split", "fused"])
async def system(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Whole]:
    secrets = tmp_path / "secrets.json"
    secrets.write_text(json.dumps({"*": ["whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]}))
    jobs = {"webhook_hosts": "hooks.invalid", "webhook_secrets_file": str(secrets)}
    async with whole(tmp_path, is_fused=request.param == "fused", jobs=jobs) as system:
        yield system


async def test_without_tracing_the_context_of_a_job_goes_on_unchanged(system: Whole) -> None:
    headers = {"traceparent": SAMPLED, "tracestate": "a=1", "baggage": "k=v"}
    await system.ended(await system.submitted(headers=headers))
    request = system.backend.requests[-1]
    assert request.trace is not None
    assert dict(request.trace.items()) == headers
    assert not request.parameters.keys() & headers.keys()


async def test_a_job_is_one_tree_from_its_submission(system: Whole) -> None:
    with tracing() as recorded:
        assert (await system.ended(await system.submitted(headers={"traceparent": SAMPLED})))["status"] == "succeeded"
        await until(lambda: bool(recorded.named("run job echo")))
    (submission,), (run,) = recorded.named(SUBMIT), recorded.named("run job echo")
    assert (submission.trace_id, submission.parent_id) == (TRACE, CALLER)
    assert (run.trace_id, run.parent_id, run.kind) == (TRACE, submission.span_id, "consumer")
    assert submission.attributes["http.response.status_code"] == 202
    ids = {span.span_id for span in recorded.spans}
    assert all(span.trace_id == TRACE and span.parent_id in {CALLER, *ids} for span in recorded.spans)
    request = system.backend.requests[-1]
    assert request.trace is not None
    assert request.trace.trace_id == TRACE


async def test_a_submission_without_a_context_begins_a_trace(system: Whole) -> None:
    with tracing() as recorded:
        await system.ended(await system.submitted())
        await until(lambda: bool(recorded.named("run job echo")))
    (submission,), (run,) = recorded.named(SUBMIT), recorded.named("run job echo")
    assert (submission.parent_id, run.parent_id) == ("", submission.span_id)


async def test_jobs_that_are_not_sampled_are_not_recorded(system: Whole) -> None:
    with tracing(Sampler()) as recorded:
        await system.ended(await system.submitted(headers={"traceparent": NOT_SAMPLED}))
        await asyncio.sleep(0)
    assert recorded.spans == []


async def test_over_grpc_and_a_repeated_key_with_another_trace_is_the_same_job(system: Whole) -> None:
    """The context is no part of what a request means."""
    request = pb.SubmitJobRequest(idempotency_key="k")
    request.request.model_name = "echo"
    request.request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    request.request.raw_input_contents.append(bytes(8))
    with tracing() as recorded:
        first = await system.call("SubmitJob", request, metadata=(("traceparent", SAMPLED),))
        request.request.parameters["traceparent"].string_param = f"00-{1:032x}-{1:016x}-01"
        second = await system.call("SubmitJob", request)
        await until(lambda: bool(recorded.named("run job echo")))
    assert (first.job.id, first.is_new, second.is_new) == (second.job.id, True, False)
    assert [span.trace_id for span in recorded.named(f"{SERVICE}/SubmitJob")] == [TRACE, f"{1:032x}"]


async def test_a_refused_submission_is_a_span_too(system: Whole) -> None:
    with tracing() as recorded:
        response = await system.rest.post("/v2/models/none/jobs", json=body(((1.0, 2.0),)), headers={"traceparent": SAMPLED})
    assert response.status_code == 404
    assert [span.attributes["http.response.status_code"] for span in recorded.named(SUBMIT)] == [404]


async def test_a_webhook_is_stored_with_the_trace_of_its_job(system: Whole) -> None:
    options = {"webhook": "https://hooks.invalid/x"}
    job = await system.submitted(headers={"traceparent": SAMPLED}, params=options)
    stored = await system.queue.get(JobCaller(), job["id"])
    assert stored.webhook is not None
    assert stored.webhook.trace == {"traceparent": SAMPLED}
    assert "trace" not in job["webhook"]
