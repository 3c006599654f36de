"""The line that the log has for a request: which requests have one, and what it says."""

from __future__ import annotations

from typing import Any

import grpc
import msgspec
import pytest
from structlog.testing import capture_logs

from splitserve.api.inference import inference_pb2 as pb
from splitserve.batching.merging import MAX_IDS_LENGTH, merge
from splitserve.errors import Unavailable
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.oip.protobuf import SERVICE
from splitserve.server.logs import RequestLog, every_of
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, signature
from tests.contracts.faces import served

X = TensorSpec("x", "FP32", ("batch", 1))
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 1], "data": [1.0, 2.0]}]}
INFER, PREDICT = "/v2/models/echo/infer", "/v1/models/echo:predict"


def backend(*, fails: bool = False) -> FakeInference:
    def answer(request: InferRequest) -> InferResponse:
        if fails:
            raise Unavailable("it is down", stage="preprocess")
        return InferResponse(request.model, request.version, request.inputs, request.id)

    return FakeInference(signature("echo", [X], version="2.1"), answer=answer)


def lines(log: list[Any]) -> list[dict[str, Any]]:
    return [line for line in log if line["event"] in ("infer", "predict")]


@pytest.mark.parametrize(("path", "body", "event"), [(INFER, BODY, "infer"), (PREDICT, {"instances": [[1.0], [2.0]]}, "predict")])
async def test_a_line_says_who_what_and_how_long(path: str, body: object, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id, rows, bytes and the milliseconds of its phases; nothing of what was sent."""
    monkeypatch.setattr(RequestLog, "every", 1)
    with capture_logs() as log:
        async with served(backend=backend()) as system:
            await system.rest.post(path, json=body, headers={"x-request-id": "r-7"})
    (line,) = lines(log)

    assert line["event"] == event
    assert (line["model"], line["version"], line["status"]) == ("echo", "2.1", "OK")
    assert (line["request_id"], line["rows"], line["bytes"]) == ("r-7", 2, 8)
    assert line["queue_ms"] + line["hop_ms"] + line["encode_ms"] <= line["duration_ms"] + 0.01  # each is rounded


async def test_a_failure_names_the_stage_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default only such requests have a line."""
    monkeypatch.setattr(RequestLog, "every", every_of("failed"))
    with capture_logs() as log:
        async with served(backend=backend()) as system:
            await system.rest.post(INFER, json=BODY)
        async with served(backend=backend(fails=True)) as system:
            await system.rest.post(INFER, json={**BODY, "id": "mine"})
    (line,) = lines(log)

    assert (line["status"], line["failed_stage"], line["request_id"]) == ("UNAVAILABLE", "preprocess", "mine")


async def test_a_sample_has_one_in_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all that fail."""
    monkeypatch.setattr(RequestLog, "every", every_of("sampled:3"))
    monkeypatch.setattr(RequestLog, "_n_seen", 0)
    with capture_logs() as log:
        async with served(backend=backend()) as system:
            for _ in range(7):
                await system.rest.post(INFER, json=BODY)
            await system.rest.post(INFER, json={"inputs": []})

    assert [line["status"] for line in lines(log)] == ["OK", "OK", "INVALID_ARGUMENT"]


@pytest.mark.parametrize("text", ["none", "sampled", "sampled:0", "sampled:-1", "sampled:x", ""])
def test_other_words_are_refused(text: str) -> None:
    """They say what is expected."""
    with pytest.raises(ValueError, match="sampled:N"):
        every_of(text)


async def test_an_id_in_metadata_is_the_request_s_and_comes_back(engine: str) -> None:
    """As the header does over REST: the next stage gets it, and so does the caller, also with an error."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 1])
    tensor.contents.fp32_contents.append(1.0)
    metadata = (("x-request-id", "r-8"),)
    down = backend(fails=True)
    async with served(backend=backend()) as system, served(backend=down) as failing:
        message = pb.ModelInferRequest(model_name="echo", inputs=[tensor]).SerializeToString()
        infer = system.channel.unary_unary(f"/{SERVICE}/ModelInfer")(message, metadata=metadata)
        answer = pb.ModelInferResponse.FromString(await infer)
        trailers = dict(await infer.trailing_metadata())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await failing.channel.unary_unary(f"/{SERVICE}/ModelInfer")(message, metadata=metadata)

        assert [request.id for request in system.backend.requests] == ["r-8"]
    assert answer.id == "r-8"
    assert trailers["x-request-id"] == "r-8"
    assert [request.id for request in down.requests] == ["r-8"]
    assert dict(refused.value.trailing_metadata() or ())["x-request-id"] == "r-8"


async def test_a_request_without_an_id_gets_one(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller finds it in the header over REST, each stage logs it, and the answer has no id."""
    monkeypatch.setattr(RequestLog, "every", 1)
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 1])
    tensor.contents.fp32_contents.append(1.0)
    message = pb.ModelInferRequest(model_name="echo", inputs=[tensor]).SerializeToString()
    down = backend(fails=True)
    with capture_logs() as log:
        async with served(backend=backend()) as system, served(backend=down) as failing:
            posts = ((INFER, BODY), (PREDICT, {"instances": [[1.0]]}))
            answers = [await system.rest.post(path, json=body) for path, body in posts]
            infer = system.channel.unary_unary(f"/{SERVICE}/ModelInfer")(message)
            answer = pb.ModelInferResponse.FromString(await infer)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await failing.channel.unary_unary(f"/{SERVICE}/ModelInfer")(message)

            made = [request.log_id for request in (*system.backend.requests, *down.requests)]
    told = [*(each.headers["x-request-id"] for each in answers), dict(refused.value.trailing_metadata() or ())["x-request-id"]]

    assert len(set(made)) == 4
    assert told == [*made[:2], made[3]]
    assert [line["request_id"] for line in lines(log)] == made
    assert answer.id == ""
    assert "id" not in answers[0].json()


def test_an_id_that_was_made_reaches_the_logs_of_the_next_stage() -> None:
    """Over a stream, where messages have numbers of their own; in a merged call too."""
    request = InferRequest("m", (Tensor("x", "FP32", (1, 1), b"\0\0\0\0"),), log_id="made")
    named = msgspec.structs.replace(request, id="given")

    received = [protobuf.encode_stream_request(each, "7") for each in (request, named, merge([request, named]))]

    assert [protobuf.decode_request(*protobuf.parse_request(each)[:1]).id for each in received] == ["made", "given", "made,given"]


def test_a_merged_call_has_the_ids_of_its_requests() -> None:
    """So that the lines of the next stage can be found by each; as many as a line can hold, none cut."""

    def of(identity: str) -> InferRequest:
        return InferRequest("m", (Tensor("x", "FP32", (1, 1), b"\0\0\0\0"),), id=identity)

    many = merge([of(f"id-{index:03}") for index in range(500)]).id

    assert merge([of("a"), of(""), of("b")]).id == "a,b"
    assert merge([of(""), of("")]).id == ""
    assert len(many) <= MAX_IDS_LENGTH
    assert many.startswith("id-000,id-001,")
    assert all(len(each) == 6 for each in many.split(","))


@pytest.mark.parametrize("given", [True, False])
async def test_a_request_that_is_refused_has_an_id(given: bool) -> None:
    """That of its header, or one that is made: the caller finds its line in the log, also if the body cannot be read."""
    headers = {"x-request-id": "r-9"} if given else {}
    with capture_logs() as log:
        async with served(backend=backend()) as system:
            answers = [
                await system.rest.post(INFER, content=b"{", headers=headers),
                await system.rest.post(INFER, json={"inputs": []}, headers=headers),
                await system.rest.post("/v2/models/none/infer", json=BODY, headers=headers),
            ]
            infer = system.channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"", metadata=tuple(headers.items()))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await infer
    told = [answer.headers["x-request-id"] for answer in answers]
    told.append(str(dict(refused.value.trailing_metadata() or ())["x-request-id"]))

    assert [line["request_id"] for line in lines(log)] == told
    assert set(told) == {"r-9"} if given else len(set(told)) == 4
