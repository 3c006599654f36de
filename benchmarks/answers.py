"""Checks that answers are right, before anything is measured; many rows at once, so that a server that merges rows does so."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from benchmarks.loads import STREAM_PATH, UNARY_PATH
from benchmarks.processes import BenchmarkError
from benchmarks.workloads import N_ROWS, RestBody, Workload
from splitserve.arrays import Array

_N_CALLERS = 16
_TIMEOUT_S = 30.0
_CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]

ComparedOutput = Callable[[int], Array | None]
"""The answer's compared output for a row, by its number."""


def post(address: str, model: str, body: RestBody) -> tuple[int, bytes, int | None]:
    """Status, body and length of the JSON part of an answer in binary form."""
    connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", body.content, dict(body.headers))
        answer = connection.getresponse()
        length = answer.headers.get("inference-header-content-length")
        return answer.status, answer.read(), None if length is None else int(length)
    finally:
        connection.close()


def is_answering(address: str, model: str, body: RestBody) -> bool:
    """Whether this request is answered with 200."""
    try:
        return post(address, model, body)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def is_answering_grpc(address: str, workload: Workload) -> bool:
    """Whether a call is answered without an error."""
    with grpc.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(UNARY_PATH)
        try:
            call(workload.grpc(0), timeout=1.0)
        except grpc.RpcError:
            return False
        return True


def check_rest(address: str, workload: Workload, form: Callable[[int], RestBody]) -> None:
    """Raises:
    BenchmarkError: an answer is not the original pipeline's.
    """

    def ask(index: int) -> Array | None:
        status, body, length = post(address, workload.model, form(index))
        if status != 200:
            raise BenchmarkError(f"{workload.model}: status {status}: {body[:300].decode(errors='replace')}")
        return workload.from_rest(body, length)

    _check(workload, ask, "REST")


def check_grpc(address: str, workload: Workload) -> int:
    """Size of an answer in bytes.

    Raises:
        BenchmarkError: an answer is not the original pipeline's.
    """
    with grpc.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(UNARY_PATH)

        def ask(index: int) -> Array | None:
            try:
                return workload.from_grpc(call(workload.grpc(index), timeout=_TIMEOUT_S))
            except grpc.RpcError as error:
                raise BenchmarkError(f"{workload.model}: {error}") from error

        _check(workload, ask, "gRPC")
        return len(call(workload.grpc(0), timeout=_TIMEOUT_S))


def _check(workload: Workload, ask: ComparedOutput, transport: str) -> None:
    with ThreadPoolExecutor(_N_CALLERS) as callers:
        for index, answer in enumerate(callers.map(ask, range(min(N_ROWS, 8 * len(workload.rows))))):
            if not workload.is_right(index, answer):
                expected = workload.expected[index % len(workload.rows)]
                raise BenchmarkError(
                    f'{workload.model} over {transport}, row {index}: "{workload.output}" is {answer}, expected {expected}'
                )


def offers_stream(address: str, workload: Workload) -> bool:
    """Whether the server has ModelStreamInfer.

    Raises:
        BenchmarkError: it fails otherwise.
    """
    with grpc.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(STREAM_PATH)
        answers = call(iter([workload.grpc(0)]), timeout=_TIMEOUT_S)
        try:
            n_answers = sum(1 for _ in answers)
        except grpc.RpcError as error:
            if answers.code() == grpc.StatusCode.UNIMPLEMENTED:
                return False
            raise BenchmarkError(f"{workload.model} over a gRPC stream: {error}") from error
        return n_answers == 1
