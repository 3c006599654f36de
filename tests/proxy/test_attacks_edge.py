"""What an outsider finds at the edge: certificates that do not hold, no secrets, no counters that grow, nothing of the inside."""

from __future__ import annotations

import asyncio
import datetime
import json
import re
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from pydantic import ValidationError

from predict_service.settings import PredictSettings
from preprocess_service.settings import PreprocessSettings
from proxy.settings import ProxySettings
from splitserve.api.inference import inference_pb2 as pb
from tests.certificates import Files, replace, write
from tests.contracts.faces import served
from tests.proxy.test_attacks_http import INSIDE

ROW = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.5]}
ALL = (PreprocessSettings, PredictSettings, ProxySettings)


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, ca: trustme.CA) -> Files:
    return write(tmp_path / "server", ca)


def mutual(files: Files) -> dict[str, Any]:
    return {"tls_cert_file": files.cert, "tls_key_file": files.key, "tls_client_ca_file": files.ca}


def shows(files: Files, issued: Any = None) -> ssl.SSLContext:
    """What a client trusts and shows."""
    context = ssl.create_default_context(cafile=files.ca)
    if issued is not None:
        issued.configure_cert(context)
    return context


async def status(url: str, context: ssl.SSLContext) -> int:
    async with httpx.AsyncClient(verify=context, trust_env=False) as client:
        return (await client.get(f"{url}/v2/health/live")).status_code


@pytest.mark.parametrize("case", ["expired", "not yet valid", "signed by itself"])
async def test_an_invalid_client_certificate_is_refused(case: str, ca: trustme.CA, files: Files) -> None:
    """F06: by its time or by who signed it; and one that holds is let in."""
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    bad = {
        "expired": lambda: ca.issue_cert("c.example", not_before=now - 2 * day, not_after=now - day),
        "not yet valid": lambda: ca.issue_cert("c.example", not_before=now + day, not_after=now + 2 * day),
        "signed by itself": lambda: trustme.CA().issue_cert("c.example"),
    }[case]()
    async with served(**mutual(files)) as system:
        url = f"https://127.0.0.1:{system.faces.http.port}"

        with pytest.raises(httpx.TransportError):
            await status(url, shows(files, bad))
        assert await status(url, shows(files, ca.issue_cert("c.example"))) == 200
        credentials = grpc.ssl_channel_credentials(
            ca.cert_pem.bytes(), bad.private_key_pem.bytes(), bad.cert_chain_pems[0].bytes()
        )
        async with grpc.aio.secure_channel(f"127.0.0.1:{system.faces.grpc.port}", credentials) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=5)


async def test_stalled_handshakes_block_no_other_connection(files: Files, ca: trustme.CA) -> None:
    """F06: 200 connections that begin TLS and then stall, while others are served."""
    async with served(**mutual(files)) as system:
        port = system.faces.http.port
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(200)]
        for _, writer in held:
            writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")

        assert await status(f"https://127.0.0.1:{port}", shows(files, ca.issue_cert("c.example"))) == 200
        for _, writer in held:
            writer.transport.abort()


@pytest.mark.parametrize("ciphers", ["NULL:eNULL", "aNULL", "RC4:DES:3DES:EXPORT", "MD5"])
async def test_weak_ciphers_are_refused(ciphers: str, files: Files, ca: trustme.CA) -> None:
    """F06: a client that offers only weak ciphers is refused, or cannot even offer them."""
    context = shows(files, ca.issue_cert("c.example"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    except ssl.SSLError:
        return  # OpenSSL here does not even know them
    async with served(**mutual(files)) as system:
        with pytest.raises(httpx.TransportError):
            await status(f"https://127.0.0.1:{system.faces.http.port}", context)


@pytest.mark.parametrize("kind", ALL)
def test_no_setting_holds_a_secret(kind: Any) -> None:
    """F08: keys, tokens and passwords are files, named by paths; what the environment or a list of processes shows is none."""
    secret = re.compile("secret|password|passphrase|private|token|_key$|credential")

    assert {name for name in kind.model_fields if secret.search(name)} <= {"model_signature_key", "admin_token_file"}
    assert "File with a bearer token" in kind.model_fields["admin_token_file"].description
    assert "File with a public key" in PredictSettings.model_fields["model_signature_key"].description


def test_private_keys_appear_in_no_message(tmp_path: Path, files: Files) -> None:
    """F08: errors about a file name its path."""
    key = Path(files.key).read_text()
    replace(files.key, key.replace("A", "B").encode())

    with pytest.raises(ValidationError) as raised:
        ProxySettings(tls_cert_file=files.cert, tls_key_file=files.key)

    shown = str(raised.value)
    assert not any(line in shown for line in key.splitlines() if "PRIVATE" not in line)


async def test_unknown_model_names_are_not_counted(tmp_path: Path) -> None:
    """G07: counters and queues are those of pairs that are there, whatever callers name."""
    async with served() as system:
        for index in range(20):
            path = f"/v2/models/made-up-{index}/versions/{index}.1/infer"
            body = {"id": f"id-{index}", "inputs": [ROW], "parameters": {f"p{index}": index}}
            assert (await system.rest.post(path, json=body)).status_code == 404
            body["inputs"] = [{**ROW, "name": f"n{index}"}]
            assert (await system.rest.post("/v2/models/echo/infer", json=body)).status_code == 400
            answer = await system.rest.post("/v2/models/echo/infer", json={"inputs": [ROW], "parameters": {f"p{index}": index}})
            assert answer.status_code == 200

        counted = system.service.statistics._models
        batcher = system.service.batcher
        assert {model for model, _ in counted} == {"echo"}
        assert set(batcher._queues) == {("echo", "2.1")}
        assert batcher._compatible == {}
        assert batcher._requests == set()


@pytest.mark.parametrize(
    "path", ["/metrics", "/debug", "/v2/debug", "/redoc", "/debug/pprof", "/v2/logging", "/console", "/.env", "/server-status"]
)
async def test_internals_are_served_on_no_path(path: str) -> None:
    """H04: neither counters nor a console; what pages there are, /docs and /openapi.json, name nothing of this host."""
    async with served() as system:
        assert (await system.rest.get(path)).status_code == 404
        for public in ("/docs", "/openapi.json", "/v2", "/"):
            answer = await system.rest.get(public)
            assert answer.status_code == 200
            assert "server" not in answer.headers
            assert "x-powered-by" not in answer.headers
            assert socket.gethostname() not in answer.text
            assert str(Path.cwd()) not in answer.text


async def test_no_error_shows_a_traceback() -> None:
    """H04: there is no debug mode, whatever a caller requests."""
    async with served() as system:
        system.backend._answer = lambda request: 1 / 0  # type: ignore[assignment, return-value]
        for headers in ({}, {"x-debug": "1"}, {"accept": "text/html"}):
            answer = await system.rest.post("/v2/models/echo/infer?debug=true", json={"inputs": [ROW]}, headers=headers)
            assert (answer.status_code, json.loads(answer.content)["error"]) == (500, "internal error")
            assert not INSIDE.search(answer.content)
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 2])
        request = pb.ModelInferRequest(model_name="echo", inputs=[tensor], raw_input_contents=[bytes(8)])
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await system.call("ModelInfer", request)
        assert raised.value.details() == "internal error"
