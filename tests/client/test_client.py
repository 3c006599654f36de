"""Both clients over both transports against real servers: inputs, answers, questions, errors, chunks."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from splitserve.errors import (
    TABLE,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    PairMismatch,
    PermissionDenied,
    SplitserveError,
    Unavailable,
)
from splitserve.oip.messages import InferRequest, InferResponse, ModelState, remaining_s
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, serving, signature
from tests.client.ways import EXTENSIONS, Way, serving_rest

X = TensorSpec("x", "FP32", ("batch", 2))
T = TensorSpec("t", "BYTES", ("batch", 1))
ECHO = signature("echo", [X, T], version="1")
ONLY_X = signature("echo", [X], version="1")


@pytest.fixture
def service() -> FakeInference:
    return FakeInference(ECHO)


def raising(error: BaseException, *, times: int = 1_000) -> Any:
    """Raises an error as often as configured, then echoes."""
    failures = iter([error] * times)

    def answer(request: InferRequest) -> InferResponse:
        for failure in failures:
            raise failure
        return InferResponse(request.model, request.version or "1", request.inputs)

    return answer


async def test_arrays_and_lists_come_back_as_arrays_of_the_signature(way: Way, service: FakeInference) -> None:
    """Lists and float64 are sent as what the model takes; text comes back as text."""
    async with way.to(service) as client:
        answer = await client.infer("echo", {"x": [[1, 2], [3, 4]], "t": np.array(["a", None], object)})

    assert answer["x"].dtype == np.float32
    np.testing.assert_array_equal(answer["x"], [[1, 2], [3, 4]])
    assert answer["t"].tolist() == [["a"], [""]]
    assert (answer.model, answer.version) == ("echo", "1")


async def test_a_frame_comes_back_as_a_frame_with_its_index(way: Way, service: FakeInference) -> None:
    """Numbers of one output become numbered columns, text is text, and the rows keep their names."""
    service.signatures = {("echo", "1"): signature("echo", [TensorSpec("age", "FP64", ("batch", 1)), T], version="1")}
    frame = pd.DataFrame({"age": [1, None], "t": ["a", None]}, index=["first", "second"])

    async with way.to(service) as client:
        answer = await client.infer("echo", frame)

    expected = pd.DataFrame({"age": [1, np.nan], "t": ["a", ""]}, index=["first", "second"])
    pd.testing.assert_frame_equal(answer.to_frame(), expected, check_dtype=False)


async def test_inputs_that_the_model_ignores_are_not_sent(way: Way) -> None:
    """Columns of a frame and keys of a dict, whatever they hold; what the metadata does not list is sent."""
    service = FakeInference(msgspec.structs.replace(ECHO, properties={"ignored_inputs": '["id"]'}))
    rows = {"x": [[1, 2]], "t": ["a"]}

    async with way.to(service) as client:
        await client.infer("echo", {**rows, "id": [object()], "more": [1]})
        service.signatures = {("echo", "1"): msgspec.structs.replace(ECHO, inputs=(T,), properties={"ignored_inputs": '["id"]'})}
        await client.infer("echo", pd.DataFrame({"id": [object()], "t": ["a"]}))

    assert [[tensor.name for tensor in request.inputs] for request in service.requests] == [["x", "t", "more"], ["t"]]


async def test_the_values_of_an_only_input_need_no_name(way: Way) -> None:
    """An array, a list of rows, or a frame whose columns together are the row."""
    async with way.to(FakeInference(ONLY_X)) as client:
        answers = [await client.infer("echo", rows) for rows in ([[1, 2]], np.ones((1, 2)), pd.DataFrame([[1, 2.5]]))]

    assert [answer["x"].tolist() for answer in answers] == [[[1, 2]], [[1, 1]], [[1, 2.5]]]


async def test_version_outputs_and_parameters_are_sent(way: Way) -> None:
    """What the caller asks for is what the service is asked."""
    service = FakeInference(ONLY_X, signature("echo", [X], version="2.1"))

    async with way.to(service) as client:
        await client.infer("echo", np.ones((1, 2)), version="2.1", outputs=["x"], parameters={"priority": 1})

    request = service.requests[0]
    assert (request.version, [output.name for output in request.outputs]) == ("2.1", ["x"])
    assert request.parameters["priority"] == 1


async def test_server_and_model_metadata_can_be_queried(way: Way, service: FakeInference) -> None:
    """Health, metadata, and every version with its state."""
    async with way.to(service) as client:
        assert await client.is_live()
        assert await client.is_ready()
        assert await client.is_model_ready("echo")
        assert await client.is_model_ready("echo", "1")
        assert not await client.is_model_ready("nope")
        assert await client.metadata("echo") == ECHO
        assert await client.models() == [ModelState("echo", "1", "READY")]
        assert (await client.server_metadata()).extensions == (EXTENSIONS if way.is_rest else ())


async def test_not_ready_is_no_error(way: Way, service: FakeInference) -> None:
    """The question whether something is ready is answered with true or false."""
    async with way.to(service) as client:
        service.not_ready = "loading"

        assert not await client.is_ready()


@pytest.mark.parametrize("kind", TABLE)
async def test_every_error_keeps_its_class_over_the_hop(way: Way, kind: type[SplitserveError]) -> None:
    """The classes are the server's: class, message, stage, model and pair survive."""
    error = kind("what went wrong", stage="far", model="echo", pair="1.1")

    async with way.to(FakeInference(ONLY_X, answer=raising(error)), max_attempts=1) as client:
        with pytest.raises(kind) as raised:
            await client.infer("echo", np.ones((1, 2)))

    assert type(raised.value) is kind
    assert raised.value.message == "what went wrong"
    assert raised.value.metadata == {"stage": "far", "model": "echo", "pair": "1.1"}


async def test_without_a_signature_the_datatypes_follow_from_the_values(way: Way, service: FakeInference) -> None:
    """A server without signatures may still infer, and reports itself what it refuses."""
    async with way.to(service) as client:
        answer = await client.infer("other", {"x": [[1, 2]], "t": ["a"]})
        service._answer = raising(NotFound("no such model"))
        with pytest.raises(NotFound, match="no such model"):
            await client.infer("other", {"x": [[1, 2]]})

    assert answer["x"].dtype == np.int64


async def test_an_unreachable_server_is_unavailable(way: Way) -> None:
    """For every method."""
    async with way.at("http://127.0.0.1:1" if way.is_rest else "127.0.0.1:1", max_attempts=2) as client:
        with pytest.raises(Unavailable, match="cannot be reached"):
            await client.infer("echo", {"x": [[1, 2]]})
        with pytest.raises(Unavailable):
            await client.is_ready()


class Stuck(FakeInference):
    """Never answers an inference."""

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        await asyncio.Event().wait()
        raise AssertionError


async def test_an_answer_after_the_timeout_is_deadline_exceeded(way: Way) -> None:
    """The client's timeout applies unless the call has its own."""
    async with way.to(Stuck(ONLY_X), timeout_s=20) as client:
        with pytest.raises(DeadlineExceeded):
            await client.infer("echo", np.ones((1, 2)), timeout_s=0.2)


async def test_the_remaining_time_is_sent_as_the_timeout(grpc_way: Way) -> None:
    """The service never has more time than the caller."""
    service = FakeInference(ONLY_X)

    async with grpc_way.to(service, timeout_s=20) as client:
        await client.infer("echo", np.ones((1, 2)))

    assert 0 < remaining_s(service.requests[0].deadline) <= 20


async def test_requests_that_reached_no_model_are_retried(grpc_way: Way) -> None:
    """UNAVAILABLE, a few times: the caller does not notice."""
    service = FakeInference(ONLY_X, answer=raising(Unavailable("not now"), times=2))

    async with grpc_way.to(service) as client:
        answer = await client.infer("echo", np.ones((1, 2)))

    assert answer["x"].tolist() == [[1, 1]]
    assert len(service.requests) == 3


@pytest.mark.parametrize("error", [InvalidInput("bad"), Unavailable("tried already", stage="far")])
async def test_errors_that_are_not_retryable_are_not_retried(grpc_way: Way, error: SplitserveError) -> None:
    """Nor is a request for which the server says so, with a negative pushback."""
    service = FakeInference(ONLY_X, answer=raising(error))

    async with grpc_way.to(service) as client:
        with pytest.raises(type(error)):
            await client.infer("echo", np.ones((1, 2)))

    assert len(service.requests) == 1


async def test_a_signature_that_changed_is_fetched_again(way: Way) -> None:
    """A known signature that the server's answer contradicts is not relied on a second time."""
    service = FakeInference(ONLY_X)
    changed = signature("echo", [TensorSpec("x", "INT64", ("batch", 2))], version="1")

    async with way.to(service) as client:
        await client.infer("echo", [[1, 2]])
        service.signatures = {("echo", "1"): changed}
        service._answer = picky
        answer = await client.infer("echo", [[1, 2]])

    assert answer["x"].dtype == np.int64


def picky(request: InferRequest) -> InferResponse:
    if request.inputs[0].datatype != "INT64":
        raise InvalidInput(f"expected INT64, got {request.inputs[0].datatype}")
    return InferResponse(request.model, "1", request.inputs)


async def test_a_malformed_answer_is_not_the_callers_fault(way: Way) -> None:
    """Bytes that are not what the datatype and the shape say."""
    broken = InferResponse("echo", "1", (Tensor("x", "FP32", (1, 2), b"\x00"),))

    async with way.to(FakeInference(ONLY_X, answer=lambda request: broken)) as client:
        with pytest.raises(PairMismatch, match=r"malformed response|a stage|bytes"):
            await client.infer("echo", np.ones((1, 2)))


async def test_large_messages_are_compressed_over_grpc(grpc_way: Way) -> None:
    """The answer is the same."""
    async with grpc_way.to(FakeInference(ONLY_X), compression="gzip") as client:
        answer = await client.infer("echo", np.ones((10_000, 2)), chunk_rows=0)

    assert answer["x"].sum() == 20_000


N_ROWS = 103
ROWS = np.arange(2 * N_ROWS, dtype=np.float32).reshape(N_ROWS, 2)


async def test_a_large_table_is_sent_in_chunks_and_answered_in_order(way: Way) -> None:
    """All to the version that answered the first, each with its rows; the progress is reported."""
    service = FakeInference(ONLY_X)
    heard: list[tuple[int, int]] = []

    async with way.to(service) as client:
        answer = await client.infer("echo", ROWS, chunk_rows=10, progress=lambda *done: heard.append(done))

    np.testing.assert_array_equal(answer["x"], ROWS)
    assert sorted(request.inputs[0].n_rows for request in service.requests) == [3] + [10] * 10
    assert len({request.version for request in service.requests[1:]}) == 1
    assert service.requests[-1].version == answer.version
    assert heard[0] == (10, N_ROWS)
    assert heard[-1] == (N_ROWS, N_ROWS)
    assert heard == sorted(heard)


async def test_the_version_that_answers_first_answers_all(grpc_way: Way) -> None:
    """A route that sends some requests elsewhere does not split a table between versions."""
    service = FakeInference(ONLY_X, answer=lambda request: InferResponse("echo", request.version or "7.3", request.inputs))

    async with grpc_way.to(service) as client:
        answer = await client.infer("echo", ROWS, chunk_rows=50)

    assert answer.version == "7.3"
    assert [request.version for request in service.requests] == ["", "7.3", "7.3"]


async def test_a_frame_is_cut_by_its_bytes(way: Way) -> None:
    """About a mebibyte at a time, by default."""
    service = FakeInference(ONLY_X)
    rows = np.zeros((300_000, 2), np.float32)

    async with way.to(service) as client:
        answer = await client.infer("echo", rows)

    assert answer["x"].shape == rows.shape
    assert len(service.requests) == 3
    assert all(len(request.inputs[0].raw) <= 2**20 for request in service.requests)


async def test_inputs_that_may_not_be_a_table_are_not_chunked(way: Way) -> None:
    """A model whose signature has a fixed leading dimension answers for the whole."""
    service = FakeInference(signature("echo", [TensorSpec("x", "FP32", (600_000,))], version="1"))

    async with way.to(service) as client:
        await client.infer("echo", {"x": np.zeros(600_000)})

    assert len(service.requests) == 1


async def test_the_first_chunk_that_fails_ends_the_others_and_names_its_rows(way: Way) -> None:
    """Chunks that were not sent yet are not sent."""

    def answer(request: InferRequest) -> InferResponse:
        values = np.frombuffer(request.inputs[0].raw, np.float32)
        if 60 in values:
            raise InvalidInput("no sixties", stage="predict", model="echo", pair="1.1")
        return InferResponse("echo", "1", request.inputs)

    service = FakeInference(ONLY_X, answer=answer)

    async with way.to(service) as client:
        with pytest.raises(InvalidInput) as raised:
            await client.infer("echo", ROWS, chunk_rows=10, concurrency=1)

    assert raised.value.message == "rows 30 to 39: no sixties"
    assert raised.value.metadata == {"stage": "predict", "model": "echo", "pair": "1.1"}
    assert len(service.requests) == 4


class Bounded(FakeInference):
    """Counts how many requests it has at once; holds them until it has as many as expected."""

    def __init__(self, expected: int) -> None:
        super().__init__(ONLY_X)
        self.n_most = 0
        self._n_now = 0
        self._expected = expected
        self._full = asyncio.Event()

    async def infer(self, request: InferRequest) -> InferResponse:
        response = await super().infer(request)
        if len(self.requests) == 1:  # the first chunk goes alone
            return response
        self._n_now += 1
        self.n_most = max(self.n_most, self._n_now)
        if self._n_now == self._expected:
            self._full.set()
        await self._full.wait()
        self._n_now -= 1
        return response


async def test_the_number_of_chunks_in_flight_is_as_configured(way: Way) -> None:
    """Not fewer, or the server would idle, and not more."""
    service = Bounded(expected=3)

    async with way.to(service) as client:
        await client.infer("echo", ROWS, chunk_rows=10, concurrency=3)

    assert service.n_most == 3


async def test_chunks_in_flight_are_cancelled_when_one_fails(way: Way) -> None:
    """The caller does not wait for useless answers."""

    class OneFails(FakeInference):
        async def infer(self, request: InferRequest) -> InferResponse:
            response = await super().infer(request)
            if len(self.requests) == 3:
                raise InvalidInput("no")
            if len(self.requests) == 2:
                await asyncio.Event().wait()
            return response

    async with way.to(OneFails(ONLY_X), timeout_s=300) as client:
        with pytest.raises(InvalidInput, match="rows"):
            await client.infer("echo", ROWS, chunk_rows=40, concurrency=2)


async def test_a_model_is_loaded_where_the_server_permits_it(way: Way) -> None:
    """For operators."""
    service = FakeInference(ONLY_X)
    serve = serving_rest if way.is_rest else serving

    async with serve(service, allow_control=True) as address, way.at(address) as client:
        await client.load("echo")
    async with serve(service) as address, way.at(address) as client:
        with pytest.raises(PermissionDenied, match="ALLOW_REPOSITORY_CONTROL"):
            await client.load("echo")

    assert service.controlled == [("load", "echo")]


async def test_an_answer_with_another_number_of_rows_is_a_mismatch(way: Way) -> None:
    """A caller never sees another's row."""

    def answer(request: InferRequest) -> InferResponse:
        return InferResponse("echo", "1", (Tensor("x", "FP32", (1, 2), bytes(8)),))

    async with way.to(FakeInference(ONLY_X, answer=answer)) as client:
        with pytest.raises(PairMismatch, match=r"expected 50 rows, got shape \[1, 2\]"):
            await client.infer("echo", ROWS, chunk_rows=50)


async def test_one_client_serves_many_threads(way: Way) -> None:
    """And many tasks."""
    service = FakeInference(ONLY_X)

    async with way.to(service) as client:
        answers = await asyncio.gather(*(client.infer("echo", ROWS[row : row + 1]) for row in range(20)))

    np.testing.assert_array_equal(np.concatenate([answer["x"] for answer in answers]), ROWS[:20])


async def test_a_progress_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With rich, which the commands bring."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    async with Way(is_rest=False, is_async=True).to(FakeInference(ONLY_X)) as client:
        await client.infer("echo", ROWS, chunk_rows=10, progress=True)

    assert f"{N_ROWS}/{N_ROWS}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_rows": -1}, "chunk_rows: expected 0 or more, got -1"),
        ({"concurrency": 0}, "concurrency: expected at least 1, got 0"),
        ({"timeout_s": 0}, "timeout_s: expected more than 0 seconds, got 0"),
    ],
)
async def test_invalid_options_are_named(way: Way, options: dict[str, Any], message: str) -> None:
    """Before anything is sent."""
    async with way.at("http://127.0.0.1:1" if way.is_rest else "127.0.0.1:1") as client:
        with pytest.raises(ValueError, match=message):
            await client.infer("echo", ROWS, **options)


async def test_columns_are_named_after_the_classes_of_the_version_that_answered(way: Way) -> None:
    """The metadata's labels; those of another version are not used for its answers."""
    scores = TensorSpec("scores", "FP32", ("batch", 2))
    old, new = (
        msgspec.structs.replace(signature("m", [X], [scores], version=version), properties=properties)
        for version, properties in (
            ("1.1", {"labels": '["no", "yes"]', "default": "1.1"}),
            ("2.2", {"labels": '{"scores": ["yes", "no"]}', "default": "2.2"}),
        )
    )
    service = FakeInference(old, new, answer=lambda request: _scores(request, "1.1"))
    async with way.to(service) as client:
        first = await client.infer("m", {"x": [[1, 2]]})
        service._answer = lambda request: _scores(request, "2.2")
        second = await client.infer("m", {"x": [[1, 2]]})

    assert first.to_frame().to_dict("list") == {"scores_no": [0.25], "scores_yes": [0.75]}
    assert second.to_frame().to_dict("list") == {"scores_yes": [0.25], "scores_no": [0.75]}
    assert list(second.to_frame(names={"scores": ["a", "b"]})) == ["a", "b"]


def _scores(request: InferRequest, version: str) -> InferResponse:
    values = np.array([[0.25, 0.75]], np.float32)
    return InferResponse(request.model, version, (Tensor("scores", "FP32", (1, 2), values.tobytes()),))
