"""The Open Inference Protocol over REST, line by line; docs/conformance.md lists the lines."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import httpx
import pytest

from splitserve.oip.messages import UNAVAILABLE, ModelState, remaining_s
from tests.contracts.faces import LIMIT, Served, served

pytestmark = pytest.mark.asyncio(loop_scope="module")

INFER = "/v2/models/echo/infer"
ROW = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.5]}
FOUR = {"datatype": "INT32", "shape": [1, 4]}
SIMPLE = {"inputs": [{"name": "INPUT0", **FOUR, "data": [1, 2, 3, 4]}, {"name": "INPUT1", **FOUR, "data": [4, 3, 2, 1]}]}


def lines(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.line(*names)


def case(line: str, title: str, *values: Any) -> Any:
    """One line of a table; ``line`` is its number in the checklist."""
    return pytest.param(*values, id=f"{line} {title}", marks=lines(line))


def error_of(answer: httpx.Response) -> str:
    """The message of an error in the protocol's form."""
    assert answer.headers["content-type"] == "application/json"
    message = answer.json()["error"]
    assert isinstance(message, str)
    return message


def with_input(model: str = "echo", **changes: Any) -> tuple[str, dict[str, Any]]:
    """Path and body of an inference whose input differs from `ROW`; a field that is ... is left out."""
    tensor = {name: value for name, value in {**ROW, **changes}.items() if value is not ...}
    return f"/v2/models/{model}/infer", {"inputs": [tensor]}


TEXT = b'{"inputs": [{"name": "x", "datatype": "%s", "shape": [1, 2], "data": %s}]}'
"""A body as it is written, where a JSON writer would write it otherwise."""


def of_type(datatype: str, data: Any) -> tuple[str, dict[str, Any]]:
    return with_input(f"identity_{datatype.lower()}", datatype=datatype, data=data)


def binary(head: dict[str, Any], *raws: bytes, length: str | bytes | None = None) -> dict[str, Any]:
    """Content and headers of a request with binary tensors behind its JSON."""
    text = json.dumps(head).encode()
    return {
        "content": text + b"".join(raws),
        "headers": {"Inference-Header-Content-Length": str(len(text)) if length is None else length},
    }


def split(answer: httpx.Response) -> tuple[dict[str, Any], bytes]:
    """JSON and binary tensors of an answer."""
    length = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    return json.loads(answer.content[:length]), answer.content[length:]


QUESTIONS = [
    case("R-01", "live", "/v2/health/live", {"live": True}),
    case("R-02", "ready", "/v2/health/ready", {"ready": True, "live": True}),
    case("R-05", "model", "/v2/models/echo/ready", {"name": "echo", "ready": True}),
    case("R-05", "version", "/v2/models/echo/versions/1.1/ready", {"name": "echo", "ready": True}),
    case("R-05", "query string", "/v2/models/echo/ready?test_1=1", {"name": "echo", "ready": True}),
]


@lines("D1")
@pytest.mark.parametrize(("path", "content"), QUESTIONS)
async def test_health_is_in_the_body_too(system: Served, path: str, content: Any) -> None:
    """Some clients read the status, others the JSON (D1)."""
    answer = await system.rest.get(path)

    assert (answer.status_code, answer.headers["content-type"], answer.json()) == (200, "application/json", content)


@lines("R-03", "D20")
@pytest.mark.parametrize("path", ["/v2", "/v2/"])
async def test_server_metadata_lists_extensions(system: Served, path: str) -> None:
    """Name, version and what works, with and without a slash, never a redirect."""
    answer = await system.rest.get(path)

    document = answer.json()
    assert (answer.status_code, document["name"], type(document["version"])) == (200, "splitserve", str)
    assert document["extensions"] == [
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "parameters",
        "schedule_policy",
        "statistics",
    ]


@lines("R-04")
async def test_metadata_shows_the_batch_dimension_as_minus_one(system: Served) -> None:
    """-1 stands for it; the name, versions and platform are there."""
    answer = await system.rest.get("/v2/models/simple")

    tensor = {"datatype": "INT32", "shape": [-1, 4]}
    assert answer.json() == {
        "name": "simple",
        "versions": ["1.1"],
        "platform": "test",
        "inputs": [{"name": name, **tensor} for name in ("INPUT0", "INPUT1")],
        "outputs": [{"name": name, **tensor} for name in ("OUTPUT0", "OUTPUT1")],
    }


@lines("R-05", "D2")
async def test_not_ready_is_503() -> None:
    """Load balancers understand it; the reason is in the body."""
    async with served() as system:
        system.backend.states[:] = [ModelState("echo", "2.1", UNAVAILABLE, "damaged")]
        await system.service.refresh()

        server, model = await system.rest.get("/v2/health/ready"), await system.rest.get("/v2/models/echo/ready")

    assert (server.status_code, model.status_code) == (503, 503)
    assert "damaged" in error_of(model)
    assert model.headers["retry-after"] == "1"


REFUSED = [
    case("R-04", "unknown model", "GET", "/v2/models/nope", {}, 404),
    case("R-05", "unknown model", "GET", "/v2/models/nope/ready", {}, 404),
    case("R-06", "unknown model", "POST", "/v2/models/nope/infer", {"json": {"inputs": [ROW]}}, 404),
    case("D14", "unknown version", "POST", "/v2/models/echo/versions/9.9/infer", {"json": {"inputs": [ROW]}}, 404),
    case("D14", "version that is no pair", "POST", "/v2/models/echo/versions/abc/infer", {"json": {"inputs": [ROW]}}, 404),
    case("R-07", "GET on infer", "GET", INFER, {}, 405),
    case("R-07", "POST on health", "POST", "/v2/health/live", {}, 405),
    case("R-08", "unknown path", "GET", "/v3", {}, 404),
    case("D13", "multipart", "POST", INFER, {"files": {"x": b"1"}}, 415),
    case("I-31", "unknown encoding", "POST", INFER, {"content": b"x", "headers": {"content-encoding": "br"}}, 415),
    case("B-12", "too large", "POST", INFER, {"content": b" " * (LIMIT + 1)}, 413),
]


@lines("D3")
@pytest.mark.parametrize(("method", "path", "options", "status"), REFUSED)
async def test_an_error_has_the_protocols_form(
    system: Served, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    """``{"error": "…"}`` with every status, and the content type that clients compare (D3)."""
    answer = await system.rest.request(method, path, **options)

    assert answer.status_code == status
    assert error_of(answer)
    assert ("allow" in answer.headers) == (status == 405)


@lines("D10")
async def test_the_message_for_an_unknown_model_is_the_one_that_clients_match(system: Served) -> None:
    """tritonclient's programs compare the beginning."""
    answer = await system.rest.post("/v2/models/nope/infer", json={"inputs": [ROW]})

    assert error_of(answer).startswith("Request for unknown model: 'nope' is not found")


@lines("R-07")
async def test_head_is_get_without_a_body(system: Served) -> None:
    """Probes use it."""
    answer = await system.rest.head("/v2/health/live")

    assert (answer.status_code, answer.content) == (200, b"")


@lines("R-09")
async def test_models_are_listed(system: Served) -> None:
    """As KServe does."""
    assert "echo" in (await system.rest.get("/v2/models")).json()["models"]


DEEP = b"[" * 50_000 + b"]" * 50_000

MALFORMED = [
    case("I-02", "ragged", *with_input("identity_fp32", shape=[2, 2], data=[[1, 2], [3]])),
    case("I-02", "too few", *with_input(data=[1.0])),
    case("I-02", "too many", *with_input(data=[1.0, 2.0, 3.0])),
    case("I-03", "nested otherwise", *with_input(shape=[2, 2], data=[[1, 2, 3, 4]])),
    case("I-04", "negative dimension", *with_input(shape=[-1, 2])),
    case("I-04", "fraction", *with_input(shape=[1.5, 2])),
    case("I-04", "text", *with_input(shape=["1", 2])),
    case("I-04", "beyond int64", *with_input(shape=[2**70, 2])),
    case("I-04", "null", *with_input(shape=[None, 2])),
    case("I-04", "no list", *with_input(shape=2)),
    case("I-06", "scalar", *with_input(shape=[], data=[1.0])),
    case("I-07", "product wraps", *with_input(shape=[16, 2**60 + 2], data=[1.0] * 32)),
    case("I-08", "lower case", *with_input(datatype="fp32")),
    case("I-08", "STRING", *with_input(datatype="STRING")),
    case("I-08", "bogus", *with_input(datatype="FP33")),
    case("I-09", "another datatype", *with_input(datatype="FP64")),
    case("I-10", "FP16", *of_type("FP16", [1.0, 2.0])),
    case("I-10", "BF16", *of_type("BF16", [1.0, 2.0])),
    case("I-11", "UINT8 256", *of_type("UINT8", [256, 0])),
    case("I-11", "UINT8 -1", *of_type("UINT8", [-1, 0])),
    case("I-11", "INT32 2^31", *of_type("INT32", [2**31, 0])),
    case("I-11", "INT64 2^63", *of_type("INT64", [2**63, 0])),
    case("I-11", "UINT64 2^64", *of_type("UINT64", [2**64, 0])),
    case("I-12", "fraction in INT32", *of_type("INT32", [1.5, 0])),
    case("I-12", "float that may have been another integer", *of_type("INT64", [1e17, 0])),
    case("I-12", "whole, beyond INT8", *of_type("INT8", [128.0, 0])),
    case("I-13", "true in FP32", *with_input(data=[True, False])),
    case("I-13", "2 in BOOL", *of_type("BOOL", [2, 0])),
    case("I-13", "text in BOOL", *of_type("BOOL", ["true", "false"])),
    case("I-14", "text in FP32", *with_input(data=["1.0", "2.0"])),
    case("I-16", "integers in BYTES", *of_type("BYTES", [1, 2])),
    case("I-19", "missing", "/v2/models/simple/infer", {"inputs": SIMPLE["inputs"][:1]}),
    case("I-19", "extra", INFER, {"inputs": [ROW, {**ROW, "name": "y"}]}),
    case("I-19", "twice", INFER, {"inputs": [ROW, ROW]}),
    case("I-19", "none", INFER, {"inputs": []}),
    case("I-19", "wrong name", *with_input(name="y")),
    case("I-20", "unknown output", INFER, {"inputs": [ROW], "outputs": [{"name": "y"}]}),
    case("I-21", "output twice", INFER, {"inputs": [ROW], "outputs": [{"name": "x"}, {"name": "x"}]}),
    case("I-23", "id a number", INFER, {"id": 7, "inputs": [ROW]}),
    case("I-24", "a list", INFER, {"parameters": {"a": [1]}, "inputs": [ROW]}),
    case("I-24", "an object", INFER, {"parameters": {"a": {"b": 1}}, "inputs": [ROW]}),
    case("I-24", "null", INFER, {"parameters": {"a": None}, "inputs": [ROW]}),
    case("I-25", "empty", INFER, b""),
    case("I-25", "null", INFER, b"null"),
    case("I-25", "a list", INFER, b"[]"),
    case("I-25", "an object", INFER, b"{}"),
    case("I-25", "cut off", INFER, b'{"inputs": ['),
    case("I-25", "something behind", INFER, json.dumps({"inputs": [ROW]}).encode() + b"x"),
    case("I-25", "UTF-16", INFER, json.dumps({"inputs": [ROW]}).encode("utf-16")),
    case("I-25", "byte order mark", INFER, b"\xef\xbb\xbf" + json.dumps({"inputs": [ROW]}).encode()),
    case("I-27", "200 deep", *with_input(data=json.loads("[" * 200 + "]" * 200))),
    case("I-27", "50000 deep", INFER, TEXT % (b"FP32", DEEP)),
    case("I-18", "lone surrogate", "/v2/models/identity_bytes/infer", TEXT % (b"BYTES", b'["\\ud800", ""]')),
    case("D12", "null in INT32", *of_type("INT32", [None, 0])),
    case("D12", "NaN in INT32", "/v2/models/identity_int32/infer", TEXT % (b"INT32", b"[NaN, 1]")),
    case("1.3", "timeout negative", INFER, {"parameters": {"timeout": -1}, "inputs": [ROW]}),
    case("1.3", "timeout a text", INFER, {"parameters": {"timeout": "1"}, "inputs": [ROW]}),
    case("1.3", "priority a fraction", INFER, {"parameters": {"priority": 1.5}, "inputs": [ROW]}),
    case("1.3", "no class", INFER, {"inputs": [ROW], "outputs": [{"name": "x", "parameters": {"classification": 0}}]}),
]  # fmt: skip


@lines("D4")
@pytest.mark.parametrize(("path", "body"), MALFORMED)
async def test_malformed_requests_are_400(system: Served, path: str, body: Any) -> None:
    """Every mistake of a caller, never 422 or 5xx (D4); the next request is answered."""
    answer = await system.rest.post(path, content=body if isinstance(body, bytes) else json.dumps(body).encode())

    assert (answer.status_code, bool(error_of(answer))) == (400, True)
    assert (await system.rest.post(INFER, json={"inputs": [ROW]})).status_code == 200


@lines("I-09")
async def test_a_datatype_mismatch_names_both_datatypes(system: Served) -> None:
    """The expected datatype and the received one."""
    path, body = with_input(datatype="INT64", data=[1, 2])

    message = error_of(await system.rest.post(path, json=body))

    assert "FP32" in message
    assert "INT64" in message


TAKEN = [
    case("I-01", "flat", *with_input(shape=[2, 2], data=[1, 2, 3, 4]), [1, 2, 3, 4]),
    case("I-01", "nested", *with_input(shape=[2, 2], data=[[1, 2], [3, 4]]), [1, 2, 3, 4]),
    case("I-05", "no rows", *with_input(shape=[0, 2], data=[]), []),
    case("I-12", "whole", *of_type("INT32", [1.0, -2.0]), [1, -2]),
    case("I-13", "0 and 1 in BOOL", *of_type("BOOL", [0, 1]), [False, True]),
    case("I-13", "BOOL", *of_type("BOOL", [True, False]), [True, False]),
    case("I-15", "text", *of_type("BYTES", ["", "\u0000ü"]), ["", "\u0000ü"]),
    case("I-23", "id null", INFER, {"id": None, "inputs": [ROW]}, [1.0, 2.5]),
    case("I-23", "id empty", INFER, {"id": "", "inputs": [ROW]}, [1.0, 2.5]),
    case("I-28", "UINT64", *of_type("UINT64", [2**64 - 1, 0]), [2**64 - 1, 0]),
    case("I-28", "INT64", *of_type("INT64", [2**53 + 1, -(2**63)]), [2**53 + 1, -(2**63)]),
    case("I-29", "FP32 as its double", *with_input(data=[0.1, 1]), [0.10000000149011612, 1.0]),
    case("I-30", "unknown field", INFER, {"inputs": [ROW], "more": {}}, [1.0, 2.5]),
    case("D15", "reserved parameters", INFER, {"inputs": [ROW], "parameters": {"triton_x": True, "sequence_id": 0}}, [1.0, 2.5]),
    case("1.1", "outputs empty", INFER, {"inputs": [ROW], "outputs": []}, [1.0, 2.5]),
    case("D12", "NaN as text", *with_input(data=["NaN", "-Infinity"]), [None, None]),
    case("D12", "null", *with_input(data=[None, 1]), [None, 1.0]),
    case("1.3", "timeout and priority", INFER, {"inputs": [ROW], "parameters": {"timeout": 10**7, "priority": 1}}, [1.0, 2.5]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "data"), TAKEN)
async def test_well_formed_requests_are_answered(system: Served, path: str, body: Any, data: list[Any]) -> None:
    """The values are returned, flat and row-major; the answer has no empty or null fields (D6, D7)."""
    answer = await system.rest.post(path, json=body)

    message = answer.json()
    assert message["outputs"][0]["data"] == data
    assert message.keys() == {"model_name", "model_version", "outputs"}
    assert None not in message.values()


@lines("D12")
async def test_bare_nan_and_infinity_are_accepted(system: Served) -> None:
    """Python's own writer puts them."""
    body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [NaN, -Infinity]}]}'

    answer = await system.rest.post(INFER, content=body)

    assert answer.json()["outputs"][0]["data"] == [None, None]


@lines("D11")
async def test_non_finite_outputs_are_null_and_counted(system: Served) -> None:
    """A strict parser reads the answer; the exact values come as binary data."""
    answer = await system.rest.post(INFER, json={"inputs": [{**ROW, "data": ["NaN", 1.0]}]})

    output = answer.json()["outputs"][0]
    assert output["data"] == [None, 1.0]
    assert output["parameters"] == {"nonfinite_values": 1}


@lines("D6", "D8")
async def test_the_id_is_echoed_and_the_version_is_the_one_used(system: Served) -> None:
    """The newest pair if none is named."""
    newest = await system.rest.post(INFER, json={"id": "7", "inputs": [ROW]})
    named = await system.rest.post("/v2/models/echo/versions/1.1/infer", json={"inputs": [ROW]})

    assert (newest.json()["id"], newest.json()["model_version"]) == ("7", "2.1")
    assert named.json()["model_version"] == "1.1"


@lines("D7")
async def test_absent_fields_are_omitted(system: Served) -> None:
    """No null and nothing empty: strict clients would refuse it."""
    answer = await system.rest.post(INFER, json={"id": "", "inputs": [ROW]})

    assert answer.json().keys() == {"model_name", "model_version", "outputs"}
    assert answer.json()["outputs"][0].keys() == {"name", "datatype", "shape", "data"}


@lines("I-22")
async def test_only_requested_outputs_are_returned_in_that_order(system: Served) -> None:
    """One, or several the other way round."""
    answers = [
        await system.rest.post("/v2/models/simple/infer", json={**SIMPLE, "outputs": [{"name": name} for name in names]})
        for names in (["OUTPUT1"], ["OUTPUT1", "OUTPUT0"])
    ]

    names = [[output["name"] for output in answer.json()["outputs"]] for answer in answers]
    assert names == [["OUTPUT1"], ["OUTPUT1", "OUTPUT0"]]
    assert answers[0].json()["outputs"][0]["data"] == [-3, -1, 1, 3]


@lines("I-17")
async def test_bytes_that_are_not_utf_8_need_a_binary_answer(system: Served) -> None:
    """The message names the way out, and it works."""
    refused = await system.rest.post("/v2/models/weird/infer", json={"inputs": [ROW]})
    given = await system.rest.post("/v2/models/weird/infer", json={"inputs": [ROW], "parameters": {"binary_data_output": True}})

    assert refused.status_code == 400
    assert "binary_data" in error_of(refused)
    assert split(given)[1] == b"\x01\x00\x00\x00\xff"


@lines("I-26")
async def test_the_last_of_duplicate_keys_counts(system: Served) -> None:
    """As most parsers have it."""
    answer = await system.rest.post(INFER, content=json.dumps({"inputs": [ROW]})[:-1].encode() + b', "id": "a", "id": "b"}')

    assert answer.json()["id"] == "b"


@lines("D13")
@pytest.mark.parametrize("content_type", [None, "application/octet-stream", "application/x-www-form-urlencoded", "text/plain"])
async def test_the_content_type_does_not_matter(system: Served, content_type: str | None) -> None:
    """Clients send many, or none."""
    headers = {"content-type": content_type} if content_type else {}

    answer = await system.rest.post(INFER, content=json.dumps({"inputs": [ROW]}).encode(), headers=headers)

    assert answer.status_code == 200


@lines("I-31")
@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", lambda body: zlib.compress(body, wbits=-15))],
    ids=["gzip", "deflate", "bare deflate"],
)
async def test_compressed_bodies_are_accepted(system: Served, encoding: str, compress: Any) -> None:
    """Both encodings, deflate also without its frame, as some send it."""
    body = compress(json.dumps({"inputs": [ROW]}).encode())

    answer = await system.rest.post(INFER, content=body, headers={"content-encoding": encoding})

    assert answer.json()["outputs"][0]["data"] == [1.0, 2.5]


BOMB = gzip.compress(b" " * (20 * LIMIT))
DAMAGED = [
    case("I-31", "bomb", BOMB, 413),
    case("I-31", "cut off", gzip.compress(b"{}")[:-3], 400),
    case("I-31", "no gzip", b"{}", 400),
    case("I-31", "something behind", gzip.compress(b"{}") + b"x", 400),
    case("I-31", "inflates to nothing", gzip.compress(b""), 400),
]


@pytest.mark.parametrize(("body", "status"), DAMAGED)
async def test_a_damaged_or_enormous_compressed_body_is_refused(system: Served, body: bytes, status: int) -> None:
    """No more is inflated than a body may have."""
    assert len(body) < LIMIT

    answer = await system.rest.post(INFER, content=body, headers={"content-encoding": "gzip"})

    assert (answer.status_code, bool(error_of(answer))) == (status, True)


@lines("I-31", "B-11")
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_long_answers_are_compressed_if_the_client_accepts_it(system: Served, encoding: str) -> None:
    """The length of the JSON counts bytes before compression; short answers stay as they are."""
    rows = 1000
    wish = {"inputs": [{**ROW, "shape": [rows, 2], "data": [1.5] * (2 * rows)}], "parameters": {"binary_data_output": True}}

    long = await system.rest.post(INFER, json=wish, headers={"accept-encoding": encoding})
    short = await system.rest.post(INFER, json={"inputs": [ROW]}, headers={"accept-encoding": encoding})

    assert long.headers["content-encoding"] == encoding
    assert int(long.headers["content-length"]) < 8 * rows
    assert len(split(long)[1]) == 8 * rows
    assert "content-encoding" not in short.headers


@lines("I-31")
async def test_answers_are_not_compressed_unless_the_client_accepts_it(system: Served) -> None:
    """A weight of 0 says no."""
    wish = {"inputs": [{**ROW, "shape": [1000, 2], "data": [1.5] * 2000}]}

    answer = await system.rest.post(INFER, json=wish, headers={"accept-encoding": "gzip;q=0, br"})

    assert "content-encoding" not in answer.headers


@lines("I-32")
async def test_expect_100_continue_is_answered(system: Served) -> None:
    """``Expect: 100-continue``, as curl does for long bodies."""
    body = json.dumps({"inputs": [ROW]}).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"

    reader, writer = await asyncio.open_connection("127.0.0.1", system.faces.http.port)
    writer.write(head.encode())
    go_on = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    writer.write(body)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()

    assert go_on.startswith(b"HTTP/1.1 100")
    assert answer.startswith(b"HTTP/1.1 200")


@lines("I-32")
async def test_a_body_may_be_chunked(system: Served) -> None:
    """Without a length."""

    async def chunks() -> Any:
        for byte in json.dumps({"inputs": [ROW]}).encode():
            yield bytes([byte])

    answer = await system.rest.post(INFER, content=chunks())

    assert answer.status_code == 200


@lines("B-01", "B-02")
async def test_binary_and_json_inputs_may_be_mixed(system: Served) -> None:
    """What is binary follows the JSON in the order of the inputs that are."""
    first, second = SIMPLE["inputs"]
    head = {"inputs": [first, {"name": "INPUT1", **FOUR, "parameters": {"binary_data_size": 16}}]}
    raw = b"".join(number.to_bytes(4, "little") for number in second["data"])  # type: ignore[attr-defined]

    answer = await system.rest.post("/v2/models/simple/infer", **binary(head, raw))

    assert answer.json()["outputs"][0]["data"] == [5, 5, 5, 5]


@lines("B-03")
async def test_binary_and_json_outputs_may_be_mixed(system: Served) -> None:
    """Each in the requested form; the header and the content type indicate binary ones."""
    wanted = [{"name": "OUTPUT0"}, {"name": "OUTPUT1", "parameters": {"binary_data": True}}]

    answer = await system.rest.post("/v2/models/simple/infer", json={**SIMPLE, "outputs": wanted})

    head, tail = split(answer)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert head["outputs"][0]["data"] == [5, 5, 5, 5]
    assert "data" not in head["outputs"][1]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 16}
    assert len(tail) == 16


@lines("B-04")
async def test_binary_data_output_applies_to_all_outputs_but_the_exceptions(system: Served) -> None:
    """``binary_data: false`` of one output counts more."""
    wish = {**SIMPLE, "parameters": {"binary_data_output": True}}
    one_not = {**wish, "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": False}}, {"name": "OUTPUT1"}]}

    everything = await system.rest.post("/v2/models/simple/infer", json=wish)
    mixed = await system.rest.post("/v2/models/simple/infer", json=one_not)

    assert len(split(everything)[1]) == 32
    assert split(mixed)[0]["outputs"][0]["data"] == [5, 5, 5, 5]
    assert len(split(mixed)[1]) == 16


@lines("B-05")
async def test_a_length_that_covers_everything_is_plain_json(system: Served) -> None:
    """perf_analyzer sends it so."""
    answer = await system.rest.post(INFER, **binary({"inputs": [ROW]}))

    assert answer.json()["outputs"][0]["data"] == [1.0, 2.5]


RAW = [
    case("B-06", "fixed shape", "echo", b"\x00\x00\x80?\x00\x00\x00@", [1, 2]),
    case("B-06", "one dimension varies", "wave", b"\x00" * 12, [1, 3]),
    case("B-06", "bytes", "text", b"hello", [1, 1]),
]


@pytest.mark.parametrize(("model", "body", "shape"), RAW)
async def test_a_raw_body_may_be_the_only_input(system: Served, model: str, body: bytes, shape: list[int]) -> None:
    """Length 0 says that there is no JSON: one row; the answer is binary."""
    answer = await system.rest.post(f"/v2/models/{model}/infer", content=body, headers={"Inference-Header-Content-Length": "0"})

    head, tail = split(answer)
    assert head["outputs"][0]["shape"] == shape
    assert tail.endswith(body)


RAW_REFUSED = [
    case("B-06", "two inputs", "simple", b"\x00" * 16),
    case("B-06", "two dimensions vary", "image", b"\x00" * 16),
    case("B-06", "wrong size", "echo", b"\x00" * 7),
    case("B-06", "wrong multiple", "wave", b"\x00" * 7),
    case("B-06", "empty", "echo", b""),
]


@pytest.mark.parametrize(("model", "body"), RAW_REFUSED)
async def test_a_raw_body_that_does_not_fit_the_input_is_refused(system: Served, model: str, body: bytes) -> None:
    """Several inputs, several dimensions to guess, or a size that does not fill the shape."""
    answer = await system.rest.post(f"/v2/models/{model}/infer", content=body, headers={"Inference-Header-Content-Length": "0"})

    assert (answer.status_code, bool(error_of(answer))) == (400, True)


EIGHT = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
BAD_BINARY = [
    case("B-07", "negative", binary({"inputs": [ROW]}, length="-1")),
    case("B-07", "beyond the body", binary({"inputs": [ROW]}, length="1000")),
    case("B-07", "no number", binary({"inputs": [ROW]}, length="ten")),
    case("B-07", "beyond int32", binary({"inputs": [ROW]}, length="99999999999")),
    case("B-07", "no digits of ASCII", binary({"inputs": [ROW]}, length="²".encode("latin-1"))),
    case("B-08", "too short", binary({"inputs": [EIGHT]}, b"\x00" * 7)),
    case("B-08", "too long", binary({"inputs": [EIGHT]}, b"\x00" * 9)),
    case("B-08", "size negative", binary({"inputs": [{**EIGHT, "parameters": {"binary_data_size": -8}}]}, b"\x00" * 8)),
    case("B-08", "size a fraction", binary({"inputs": [{**EIGHT, "parameters": {"binary_data_size": 8.0}}]}, b"\x00" * 8)),
    case("B-08", "size missing", binary({"inputs": [{**EIGHT, "parameters": {}}]}, b"\x00" * 8)),
    case("B-09", "data too", binary({"inputs": [{**EIGHT, "data": [1, 2]}]}, b"\x00" * 8)),
    case("B-09", "another size than the shape's", binary({"inputs": [{**EIGHT, "shape": [2, 2]}]}, b"\x00" * 8)),
]


@pytest.mark.parametrize("options", BAD_BINARY)
async def test_binary_data_that_does_not_add_up_is_refused(system: Served, options: dict[str, Any]) -> None:
    """In whichever way; the server lives on."""
    answer = await system.rest.post(INFER, **options)

    assert (answer.status_code, bool(error_of(answer))) == (400, True)
    assert (await system.rest.get("/v2/health/live")).status_code == 200


@lines("B-07")
async def test_a_length_given_twice_is_refused(system: Served) -> None:
    """Two readers could split the body in two ways."""
    body = json.dumps({"inputs": [ROW]}).encode()
    headers = [("Inference-Header-Content-Length", str(len(body)))] * 2

    answer = await system.rest.post(INFER, content=body, headers=headers)

    assert (answer.status_code, bool(error_of(answer))) == (400, True)


@lines("B-10")
async def test_an_empty_output_may_be_binary(system: Served) -> None:
    """Its size is 0."""
    wish = {"inputs": [{**ROW, "shape": [0, 2], "data": []}], "parameters": {"binary_data_output": True}}

    head, tail = split(await system.rest.post(INFER, json=wish))

    assert head["outputs"][0]["parameters"] == {"binary_data_size": 0}
    assert tail == b""


@lines("1.3 model_configuration")
@pytest.mark.parametrize("path", ["/v2/models/simple/config", "/v2/models/simple/versions/1.1/config"])
async def test_the_configuration_has_what_load_generators_read(system: Served, path: str) -> None:
    """Dimensions without the batch."""
    answer = await system.rest.get(path)

    tensor = {"data_type": "TYPE_INT32", "dims": [4]}
    assert answer.json() == {
        "name": "simple",
        "platform": "test",
        "backend": "splitserve",
        "max_batch_size": 2**31 - 1,
        "input": [{"name": name, **tensor} for name in ("INPUT0", "INPUT1")],
        "output": [{"name": name, **tensor} for name in ("OUTPUT0", "OUTPUT1")],
    }


@lines("1.3 statistics")
async def test_statistics_count_rows_runs_and_failures() -> None:
    """Every field that clients read is there; a version that was never used has zeros."""
    two_rows = {"inputs": [{**ROW, "shape": [2, 2], "data": [1, 2, 3, 4]}]}
    async with served() as system:
        await system.rest.post(INFER, json=two_rows)
        await system.rest.post(INFER, json={"inputs": [{**ROW, "shape": [1, 3], "data": [1, 2, 3]}]})

        unused, used = (await system.rest.get("/v2/models/echo/stats")).json()["model_stats"]
        one = (await system.rest.get("/v2/models/echo/versions/2.1/stats")).json()["model_stats"]
        everything = (await system.rest.get("/v2/models/stats")).json()["model_stats"]
        unknown = await system.rest.get("/v2/models/nope/stats")

    counts = {name: part["count"] for name, part in used["inference_stats"].items()}
    assert (used["version"], used["inference_count"], used["execution_count"]) == ("2.1", 2, 1)
    assert counts == {
        "success": 1,
        "fail": 1,
        "queue": 1,
        "compute_input": 1,
        "compute_infer": 1,
        "compute_output": 1,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    assert [batch["batch_size"] for batch in used["batch_stats"]] == [2]
    assert 0 < used["inference_stats"]["compute_infer"]["ns"] < used["inference_stats"]["success"]["ns"]
    assert (unused["inference_count"], unused["last_inference"]) == (0, 0)
    assert one == [used]
    assert used in everything
    assert unknown.status_code == 404


@lines("1.3 classification")
async def test_the_top_classes_are_returned_as_value_and_index(system: Served) -> None:
    """Greatest first; whole numbers plain, others with six decimals."""
    whole = {**SIMPLE, "outputs": [{"name": "OUTPUT1", "parameters": {"classification": 2}}]}
    other = {"inputs": [ROW], "outputs": [{"name": "x", "parameters": {"classification": 9}}]}

    ints = (await system.rest.post("/v2/models/simple/infer", json=whole)).json()["outputs"][0]
    floats = (await system.rest.post(INFER, json=other)).json()["outputs"][0]

    assert ints == {"name": "OUTPUT1", "datatype": "BYTES", "shape": [1, 2], "data": ["3:3", "1:2"]}
    assert floats == {"name": "x", "datatype": "BYTES", "shape": [1, 2], "data": ["2.500000:1", "1.000000:0"]}


@lines("1.3 schedule_policy")
async def test_the_earliest_of_all_deadlines_applies(system: Served) -> None:
    """Of the header, in seconds, and the parameter, in microseconds; the header never beyond the maximum."""
    wish = {"inputs": [ROW]}
    await system.rest.post(INFER, json=wish, headers={"Request-Timeout": "9"})
    await system.rest.post(INFER, json={**wish, "parameters": {"timeout": 5_000_000}}, headers={"Request-Timeout": "9"})
    await system.rest.post(INFER, json=wish, headers={"Request-Timeout": "100000"})
    await system.rest.post(INFER, json={**wish, "parameters": {"timeout": 0}})

    left = [remaining_s(request.deadline) for request in system.backend.requests]
    bounds = [(0, 9), (0, 5), (9, 600), (9, 30)]
    assert all(low < seconds <= high for seconds, (low, high) in zip(left, bounds, strict=True))


@lines("1.3 schedule_policy")
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", "1e3", ""])
async def test_an_invalid_timeout_is_refused(system: Served, seconds: str) -> None:
    """Rather than taken for another."""
    answer = await system.rest.post(INFER, json={"inputs": [ROW]}, headers={"Request-Timeout": seconds})

    assert (answer.status_code, bool(error_of(answer))) == (400, True)


@lines("1.1 504")
async def test_deadline_exceeded_is_504(system: Served) -> None:
    """A request whose time is over is not sent on."""
    answer = await system.rest.post(INFER, json={"inputs": [ROW], "parameters": {"timeout": 1}})

    assert (answer.status_code, bool(error_of(answer))) == (504, True)
    assert system.backend.requests == []


@lines("1.3 model_repository")
async def test_the_repository_is_listed_and_controlled_where_that_is_allowed() -> None:
    """The index for everyone; loading and unloading only by a setting, without contents."""
    async with served() as plain, served(allow_repository_control=True) as open_to_all:
        index = await plain.rest.post("/v2/repository/index")
        refused = await plain.rest.post("/v2/repository/models/echo/load")
        done = [await open_to_all.rest.post(f"/v2/repository/models/echo/{act}") for act in ("unload", "load")]
        wish = {"parameters": {"unload_dependents": False}}  # tritonclient sends it always
        done.append(await open_to_all.rest.post("/v2/repository/models/echo/unload", json=wish))
        content = await open_to_all.rest.post("/v2/repository/models/echo/load", json={"parameters": {"config": "{}"}})
        extensions = (await open_to_all.rest.get("/v2")).json()["extensions"]

    assert {"name": "echo", "version": "1.1", "state": "READY", "reason": ""} in index.json()
    assert [answer.status_code for answer in (refused, *done, content)] == [403, 200, 200, 200, 400]
    assert "model_repository" in extensions


PREDICTED = [
    case("3", "rows", "echo", {"instances": [[1, 2], [3, 4]]}, {"predictions": [[1.0, 2.0], [3.0, 4.0]]}),
    case("3", "records", "echo", {"instances": [{"x": [1, 2]}]}, {"predictions": [[1.0, 2.0]]}),
    case("3", "signature_name", "echo", {"signature_name": "s", "instances": [[1, 2]]}, {"predictions": [[1.0, 2.0]]}),
    case("3", "no rows", "echo", {"instances": []}, {"predictions": []}),
    case("3", "one input by column", "echo", {"inputs": [[1, 2]]}, {"outputs": [[1.0, 2.0]]}),
    case("3", "named inputs by column", "simple", {"inputs": {"INPUT0": [[1, 2, 3, 4]], "INPUT1": [[1, 1, 1, 1]]}},
         {"outputs": {"OUTPUT0": [[2, 3, 4, 5]], "OUTPUT1": [[0, 1, 2, 3]]}}),
    case("3", "several outputs", "simple", {"instances": [{"INPUT0": [1, 2, 3, 4], "INPUT1": [1, 1, 1, 1]}]},
         {"predictions": [{"OUTPUT0": [2, 3, 4, 5], "OUTPUT1": [0, 1, 2, 3]}]}),
    case("3", "base64", "text", {"instances": [{"b64": "aGVsbG8="}]}, {"predictions": [["hello"]]}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "body", "content"), PREDICTED)
async def test_the_v1_form_is_answered(system: Served, model: str, body: Any, content: Any) -> None:
    """As TensorFlow Serving's and KServe's clients send it."""
    answer = await system.rest.post(f"/v1/models/{model}:predict", json=body)

    assert (answer.status_code, answer.json()) == (200, content)


@lines("3")
@pytest.mark.parametrize("path", ["/v1/models/echo%3Apredict", "/v1/models/echo/versions/1.1:predict"])
async def test_the_v1_path_is_served_in_every_spelling(system: Served, path: str) -> None:
    """The colon may be encoded, a version named."""
    answer = await system.rest.post(path, json={"instances": [[1, 2]]})

    assert answer.json() == {"predictions": [[1.0, 2.0]]}


V1_REFUSED = [
    case("3", "no instances", "echo", b"{}", 400),
    case("3", "both", "echo", b'{"instances": [], "inputs": []}', 400),
    case("3", "bad JSON", "echo", b"{", 400),
    case("3", "missing column", "simple", b'{"inputs": {"INPUT0": [[1, 2, 3, 4]]}}', 400),
    case("3", "unknown column", "echo", b'{"inputs": {"x": [[1, 2]], "y": []}}', 400),
    case("3", "column no list", "echo", b'{"inputs": {"x": 1}}', 400),
    case("3", "list for two inputs", "simple", b'{"inputs": [[1, 2, 3, 4]]}', 400),
    case("3", "lengths differ", "simple", b'{"inputs": {"INPUT0": [[1, 2, 3, 4]], "INPUT1": []}}', 400),
    case("3", "unknown model", "nope", b'{"instances": []}', 404),
]


@pytest.mark.parametrize(("model", "body", "status"), V1_REFUSED)
async def test_errors_in_the_v1_form_are_named(system: Served, model: str, body: bytes, status: int) -> None:
    """With the same form of error."""
    answer = await system.rest.post(f"/v1/models/{model}:predict", content=body)

    assert (answer.status_code, bool(error_of(answer))) == (status, True)


@lines("3")
async def test_v1_status_and_the_list_of_models_are_answered(system: Served) -> None:
    """For KServe's clients, which read ``ready``, and TensorFlow Serving's, which read the versions' states."""
    alive, models = await system.rest.get("/"), await system.rest.get("/v1/models")
    status, explained = await system.rest.get("/v1/models/echo"), await system.rest.post("/v1/models/echo:explain")

    assert alive.json() == {"status": "alive"}
    assert "echo" in models.json()["models"]
    assert status.json()["ready"] is True
    assert status.json()["model_version_status"][0] == {
        "version": "1.1",
        "state": "AVAILABLE",
        "status": {"error_code": "OK", "error_message": ""},
    }
    assert explained.status_code == 501


@lines("3")
@pytest.mark.parametrize("path", ["/v1/models/simple/metadata", "/v1/models/simple/versions/1.1/metadata"])
async def test_the_v1_metadata_is_in_the_form_of_tensorflow_serving(system: Served, path: str) -> None:
    """Numbers of 64 bits are text in protobuf's JSON."""
    answer = await system.rest.get(path)

    signature = answer.json()["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert answer.json()["model_spec"] == {"name": "simple", "signature_name": "", "version": "1.1"}
    assert signature["inputs"].keys() == {"INPUT0", "INPUT1"}
    assert signature["outputs"]["OUTPUT1"] == {
        "name": "OUTPUT1",
        "dtype": "DT_INT32",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}, {"size": "4", "name": ""}], "unknown_rank": False},
    }
    assert (await system.rest.get("/v1/models/nope/metadata")).status_code == 404
