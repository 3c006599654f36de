"""The parts of the benchmarks that compute: what they make of the load generators' output, and of time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import grpc
import numpy as np
import pytest

from benchmarks import figures, jobs, latencies, loads, measuring, open_loop, report, stream_client
from benchmarks.figures import Medians
from benchmarks.latencies import LoadResult
from benchmarks.measuring import Case, Measurement
from benchmarks.open_loop import poisson, request_bytes
from benchmarks.peer_systems import KSERVE
from benchmarks.processes import BenchmarkError
from benchmarks.systems import parse_settings
from benchmarks.workloads import Workload, grpc_frame
from splitserve.api.inference import inference_pb2 as pb
from splitserve.arrays import from_array, to_array
from splitserve.oip import protobuf
from splitserve.oip.messages import InferResponse
from splitserve.wire.http2.frames import RST_STREAM, frame
from splitserve.wire.http2.headers import encode

WRK = """Running 2s test @ http://127.0.0.1:8000/v2/models/m/infer
  1 threads and 16 connections
RESULT {"n_requests": 4000, "seconds": 2.001000, "n_failed": 3, "p50_ms": 1.250, "p99_ms": 4.500, "p999_ms": 9.000}
"""

H2LOAD = """
finished in 2.00s, 1500.00 req/s, 390.58KB/s
requests: 4 total, 4 started, 4 done, 4 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 4 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 1.15KB (1180) total, 380B (380) headers (space savings 81.00%), 400B (400) data
"""
H2LOAD_LOG = (
    "1700000000000000\t200\t1000\n1700000000000100\t200\t2000\n1700000000000200\t200\t3000\n1700000000000300\t200\t4000\n"
)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([7.0], 50, 7.0), ([1.0, 2.0, 3.0, 4.0], 50, 2.0), (list(range(1, 101)), 99, 99), (list(range(1, 1001)), 99.9, 999)],
)
def test_a_percentile_is_a_measured_value(values, percent, expected):
    """Nearest rank: the least value that at least so many percent do not exceed."""
    assert latencies.percentile(values, percent) == expected


def test_a_load_without_answers_is_an_error():
    """No answer at all is a failure of the run, not a latency of zero."""
    with pytest.raises(BenchmarkError, match="no answer"):
        latencies.of_latencies([], seconds=1.0)


def test_wrks_result_is_read():
    """The line that wrk.lua prints, whatever wrk prints around it."""
    load = loads.parse_wrk(WRK)

    assert load == LoadResult(n_requests=4000, seconds=2.001, n_failed=3, p50_ms=1.25, p99_ms=4.5, p999_ms=9.0)
    assert load.per_s == pytest.approx(1999.0, abs=0.1)


def test_wrk_without_a_result_is_shown():
    """What wrk said instead is in the error."""
    with pytest.raises(BenchmarkError, match="unable to connect"):
        loads.parse_wrk("unable to connect to 127.0.0.1:1 Connection refused")


def test_h2loads_result_is_read():
    """Latencies come from its log, and answers of the right size are no failures."""
    load = loads.parse_h2load(H2LOAD, H2LOAD_LOG, frame_bytes=100, concurrency=1)

    assert (load.n_requests, load.n_failed, load.p50_ms, load.p99_ms) == (4, 0, 2.0, 4.0)


def test_grpc_errors_are_found_by_their_size():
    """An error is a 200 without a message: too few bytes for the answers mean that calls have failed."""
    load = loads.parse_h2load(H2LOAD, H2LOAD_LOG, frame_bytes=200, concurrency=1)

    assert load.n_failed == 1


def test_statuses_other_than_200_are_failures():
    """A line of h2load's log with another status counts as failed and has no latency."""
    load = loads.parse_h2load(H2LOAD, H2LOAD_LOG.replace("200\t4000", "503\t4000"), frame_bytes=100, concurrency=1)

    assert (load.n_requests, load.n_failed, load.p99_ms) == (3, 1, 3.0)


def test_arrivals_have_the_requested_rate():
    """Random but the same every time, ascending, and as many as the rate says, within its spread."""
    times = poisson(1000, 4.0)

    assert times == poisson(1000, 4.0)
    assert all(before < after for before, after in pairwise(times))
    assert len(times) == pytest.approx(4000, abs=4 * 4000**0.5)


def test_a_raw_request_says_how_long_its_body_is():
    """HTTP/1.1, with the headers of the body's form."""
    request = request_bytes("127.0.0.1:80", "/infer", b"{}", [("content-type", "application/json")])

    assert (
        request == b"POST /infer HTTP/1.1\r\nhost: 127.0.0.1:80\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n{}"
    )


def test_frames_are_those_of_http2():
    """Length in three bytes, type, flags, stream; a literal header without indexing; gRPC's five bytes before a message."""
    assert frame(4, 1, 0, b"") == bytes([0, 0, 0, 4, 1, 0, 0, 0, 0])
    assert frame(0, 0, 1, b"abc")[:9] == bytes([0, 0, 3, 0, 0, 0, 0, 0, 1])
    assert encode([(b"te", b"trailers")]) == b"\0\x02te\x08trailers"
    assert grpc_frame(b"abc") == b"\0\0\0\0\x03abc"


def test_columns_are_aligned():
    """The table is Markdown, and readable where it is not rendered: text to the left, numbers to the right."""
    assert report.table(("a", "n"), [["x", "10"], ["long", "1"]]).splitlines() == [
        "| a    |  n |",
        "| ---- | -: |",
        "| x    | 10 |",
        "| long |  1 |",
    ]


def test_medians_are_of_each_value():
    """A round that was disturbed does not decide; failures of every round count."""
    case = Case("split", "m", "REST JSON", 1)
    rounds = [
        Measurement(case, LoadResult(n, 1.0, failed, p50, p50, p50), {"proxy": cpu})
        for n, failed, p50, cpu in ((100, 0, 1.0, 50.0), (10, 1, 9.0, 10.0), (90, 0, 2.0, 70.0))
    ]

    middle = measuring.median(rounds)

    assert (middle.load.per_s, middle.load.p50_ms, middle.load.n_failed) == (pytest.approx(90), 2.0, 1)
    assert middle.cpu_us == {"proxy": 50.0}
    assert report.cpu(middle) == "50"


def test_a_wrong_answer_is_noticed():
    """Close numbers are right, others, another shape and none are not."""
    workload = Workload("m", ({"x": np.zeros((1, 2))},), "probabilities", np.array([[0.25, 0.75]]))

    assert workload.is_right(0, np.array([[0.250001, 0.75]]))
    assert not workload.is_right(0, np.array([[0.26, 0.74]]))
    assert not workload.is_right(0, np.array([[0.25, 0.75], [0.25, 0.75]]))
    assert not workload.is_right(0, None)


def test_settings_are_name_and_value():
    """A setting without a value is refused with its name."""
    assert parse_settings(["PREPROCESS_RUNTIME=onnx", "PREDICT_PROVIDERS="]) == {
        "PREPROCESS_RUNTIME": "onnx",
        "PREDICT_PROVIDERS": "",
    }
    with pytest.raises(BenchmarkError, match="PREPROCESS_RUNTIME"):
        parse_settings(["PREPROCESS_RUNTIME"])


def outcome(**rates: float) -> Medians:
    """An outcome with these requests a second, breast-cancer over REST, 64 at once; names as in `figures` but for spaces."""
    systems = {"split": figures.SPLIT, "kserve": KSERVE}
    medians = [
        Measurement(
            Case(systems[name], "breast-cancer", "REST JSON", 64), LoadResult(int(rate), 1.0, 0, 1.0, 2.0, 3.0), {"all": 90.0}
        )
        for name, rate in rates.items()
    ]
    return Medians(medians, open_loop=None, tensor_mb_per_s={"tensor": 100.0}, pss_mb=None, cold_start_s=4.0)


def test_a_figure_is_met_at_its_bound_and_not_beyond():
    """ "At least" and "at most" include the bound, "under" does not; what was not measured is neither met nor missed."""
    met = {figure.name: figure.is_met for figure in figures.figures(outcome(split=1500, kserve=100))}

    assert met["REST, breast-cancer, 64 at once: requests/s against KServe's"] is True
    assert met["… CPU over all three services"] is True
    assert met["602 kB tensor through both hops and back, one way counted"] is False
    assert met["cold start, all three ready with the demo models"] is False
    assert met["… against the plain split's"] is None


def test_every_figure_is_in_the_table():
    """A row each, with what is required and whether it is met."""
    found = figures.figures(outcome(split=1499, kserve=100))
    lines = figures.figure_table(found).splitlines()

    assert len(lines) == 2 + len(found)
    assert [cell.strip() for cell in lines[2].split("|")[-3:-1]] == ["15", "NO"]


def halves(n_rows: int) -> Workload:
    """Rows (1, 2) of a model that answers with half of each number."""
    rows = np.arange(2 * n_rows, dtype=np.float32).reshape(n_rows, 1, 2)
    return Workload("halves", tuple({"x": row} for row in rows), "y", rows[:, 0] / 2)


@asynccontextmanager
async def streaming_server(shift: int = 0) -> AsyncIterator[str]:
    """Halves numbers over ModelStreamInfer, answers two by two in the wrong order; ``shift`` makes them wrong."""

    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        held: list[bytes] = []
        async for data in requests:
            request = protobuf.decode_request(pb.ModelInferRequest.FromString(data))
            outputs = (from_array("y", to_array(request.inputs[0]) / 2 + shift),)
            answer = protobuf.encode_response(InferResponse("halves", "1", outputs, id=request.id))
            held.append(pb.ModelStreamInferResponse(infer_response=answer).SerializeToString())
            if len(held) == 2:
                yield held.pop()
                yield held.pop()

    server = grpc.aio.server()
    handlers = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(protobuf.SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_the_stream_client_matches_answers_by_id():
    """Answers may come in another order than requests went; each slot gets its own row's."""
    async with streaming_server() as address:
        load = await stream_client.run(address, halves(8), 8, seconds=0)  # one from each slot: the server holds back every other

    assert load.n_requests == 8


async def test_the_stream_client_refuses_wrong_answers():
    """A wrong answer under load ends the run."""
    async with streaming_server(shift=1) as address:
        with pytest.raises(stream_client.StreamError, match="wrong answer"):
            await stream_client.run(address, halves(8), 8, seconds=0.1)


async def test_the_stream_client_reports_a_server_without_streams():
    """A stream that the server ends is an error, not an answer that does not come."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    with pytest.raises(stream_client.StreamError, match="ended the stream"):
        await stream_client.run(f"127.0.0.1:{port}", halves(2), 2, seconds=0.1)

    await server.stop(None)


async def test_the_stream_client_closes_its_connection_when_the_server_ends_the_stream():
    """An error leaves no connection open."""
    is_closed = asyncio.Event()

    async def end_the_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(RST_STREAM, 0, 1, bytes(4)))
        await reader.read()  # until the client closes
        is_closed.set()
        writer.close()

    async with await asyncio.start_server(end_the_stream, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(stream_client.StreamError, match="ended the stream"):
            await stream_client.run(f"127.0.0.1:{port}", halves(2), 2, seconds=0.1)
        await asyncio.wait_for(is_closed.wait(), 30)


class Sometimes(BaseHTTPRequestHandler):
    """Answers 200, and 503 to every fourth request of a connection."""

    protocol_version = "HTTP/1.1"
    n_asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.n_asked += 1
        self.send_response(503 if self.n_asked % 4 == 0 else 200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def sometimes() -> Iterator[str]:
    """The address of a server that answers so."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Sometimes) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()  # polls for shutdown
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_the_open_loop_counts_every_request(sometimes):
    """Each is answered or counted as failed; a connection with a request in flight gets no second one."""
    found = open_loop.load(sometimes, request_bytes("test", "/", b"{}", []), [0.0] * 16, n_connections=2)

    assert (found.n_requests, found.n_failed) == (12, 4)


def test_a_latency_counts_from_when_the_request_was_due(sometimes):
    """Not from when it was sent."""
    found = open_loop.load(sometimes, request_bytes("test", "/", b"{}", []), [-10.0, 0.0], n_connections=1)

    assert found.p99_ms >= 10_000


def test_a_server_that_cannot_be_reached_is_named():
    with pytest.raises(BenchmarkError, match="open_loop: connect: Connection refused"):
        open_loop.load("127.0.0.1:1", b"", [0.0])


def test_the_store_alone_does_all_jobs(tmp_path):
    """What it costs is more than nothing, and its database can be read from outside."""
    spent_us = jobs.store_cpu_us(tmp_path, 100, b"request")

    assert spent_us > 0
    assert jobs.n_jobs_of(tmp_path, "succeeded") == 100
    assert jobs.n_jobs_of(tmp_path, "queued", "running", "failed") == 0


async def test_an_orphan_is_taken_again_after_its_lease(tmp_path):
    """Not before."""
    assert await jobs.orphan_late_s(tmp_path, b"", 0.1) >= 0
