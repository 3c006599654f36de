"""Authentication and authorization at the proxy: tokens, JWT, permissions. The same table for both faces."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from structlog.testing import capture_logs

from proxy import auth
from proxy.auth import BearerAuthenticator
from proxy.faces import Faces
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import Unauthenticated
from splitserve.oip.protobuf import SERVICE
from splitserve.server import logs, settings
from splitserve.server.callers import Caller
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature

SPEC = [TensorSpec("x", "FP32", ("batch", 1))]
ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
ISSUER, AUDIENCE = "https://issuer.example", "splitserve"

USER, ADMIN, BOTH = "user-token", "admin-token", "both-token"
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def listed(name: str, token: str, **rights: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), **rights}


TOKENS = [
    listed("team", USER, models=["open-*"]),
    listed("admin", ADMIN, operator=True),
    listed("both", BOTH, models=["*"], operator=True),
]
GRANTS = [
    {"claims": {"sub": "team-*"}, "models": ["open-*"]},
    {"claims": {"roles": "operator"}, "operator": True},
    {"claims": {"scope": "call"}, "models": ["secret"]},
]
JWT = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": "keys.json", "grants": GRANTS}


def key_set(**keys: Any) -> str:
    """A JSON Web Key Set with the public halves of these keys, by their ids."""
    return json.dumps({"keys": [public_key(key, key_id) for key_id, key in keys.items()]})


def public_key(key: Any, key_id: str) -> dict[str, Any]:
    names: dict[type, Any] = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    algorithm = next(algorithm for kind, algorithm in names.items() if isinstance(key, kind))
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": key_id, "use": "sig"}


def signed(key: Any = KEY, key_id: str | None = "1", algorithm: str = "RS256", **claims: Any) -> str:
    """A JWT; claims that are None are left out."""
    all_claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 172_800, "sub": "team-a", **claims}
    present = {name: value for name, value in all_claims.items() if value is not None}
    return jwt.encode(present, key, algorithm, headers={"kid": key_id} if key_id else None)


@pytest.fixture
def auth_file(tmp_path: Path) -> Path:
    (tmp_path / "keys.json").write_text(key_set(**{"1": KEY}))
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"tokens": TOKENS, "jwt": JWT}))
    return path


def rewrite(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


async def caller_of(authenticator: BearerAuthenticator, credentials: str) -> Caller:
    """The caller with these credentials, even if recognising it takes a call."""
    return authenticator.recognise([credentials]) or await authenticator.identify([credentials])


class BothFaces:
    """Both faces of a proxy over two models, "open-1" and "secret", and a way to send the same call to either."""

    def __init__(
        self, faces: Faces, service: ProxyService, backend: FakeInference, client: httpx.AsyncClient, channel: grpc.aio.Channel
    ) -> None:
        self.faces, self.service, self.backend, self._client, self._channel = faces, service, backend, client, channel

    async def rest(self, method: str, path: str, token: str | None = None, **options: Any) -> httpx.Response:
        headers = {**options.pop("headers", {}), **({"authorization": f"Bearer {token}"} if token is not None else {})}
        return await self._client.request(method, path, headers=headers, **options)

    async def grpc(self, method: str, request: Any, token: str | None = None, metadata: Any = ()) -> Any:
        shown = (("authorization", f"Bearer {token}"),) if token is not None else ()
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            return await call(request.SerializeToString(), metadata=(*metadata, *shown), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error


@asynccontextmanager
async def opened(auth_file: Path, **environment: Any) -> AsyncIterator[BothFaces]:
    backend = FakeInference(signature("open-1", SPEC, version="1.1"), signature("secret", SPEC, version="1.1"))
    service = ProxyService(backend)
    await service.refresh()
    config = ProxySettings(
        http_port=0, grpc_port=0, auth_file=str(auth_file), ALLOW_REPOSITORY_CONTROL=True, refresh_interval_s=0.05, **environment
    )
    async with (
        Faces(service, config) as faces,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{faces.http.port}", trust_env=False, verify=False, timeout=60) as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{faces.grpc.port}") as channel,
    ):
        yield BothFaces(faces, service, backend, client, channel)


@pytest.fixture
async def faces(auth_file: Path) -> AsyncIterator[BothFaces]:
    async with opened(auth_file) as faces:
        yield faces


def infer_message(model: str) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 1])
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[bytes(4)])


ACTIONS: dict[str, tuple[tuple[str, str, Any], tuple[str, Any]]] = {
    "infer open-1": (("POST", "/v2/models/open-1/infer", ROW), ("ModelInfer", infer_message("open-1"))),
    "infer secret": (("POST", "/v2/models/secret/infer", ROW), ("ModelInfer", infer_message("secret"))),
    "infer nothing": (("POST", "/v2/models/nothing/infer", ROW), ("ModelInfer", infer_message("nothing"))),
    "metadata secret": (("GET", "/v2/models/secret", None), ("ModelMetadata", pb.ModelMetadataRequest(name="secret"))),
    "index": (("POST", "/v2/repository/index", {}), ("RepositoryIndex", pb.RepositoryIndexRequest())),
    "load open-1": (
        ("POST", "/v2/repository/models/open-1/load", {}),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="open-1")),
    ),
    "unload open-1": (
        ("POST", "/v2/repository/models/open-1/unload", {}),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="open-1")),
    ),
    "live": (("GET", "/v2/health/live", None), ("ServerLive", pb.ServerLiveRequest())),
    "ready": (("GET", "/v2/health/ready", None), ("ServerReady", pb.ServerReadyRequest())),
    "server": (("GET", "/v2", None), ("ServerMetadata", pb.ServerMetadataRequest())),
}
STATUSES = {200: grpc.StatusCode.OK, 401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED,
            404: grpc.StatusCode.NOT_FOUND}  # fmt: skip

# What: anyone, a wrong token, USER (open-*), ADMIN (operator), BOTH (*, operator).
TABLE: dict[str, tuple[int, int, int, int, int]] = {
    "infer open-1": (401, 401, 200, 403, 200),
    "infer secret": (401, 401, 403, 403, 200),
    "infer nothing": (401, 401, 403, 403, 404),
    "metadata secret": (401, 401, 403, 403, 200),
    "index": (401, 401, 200, 200, 200),
    "load open-1": (401, 401, 403, 200, 200),
    "unload open-1": (401, 401, 403, 200, 200),
    "live": (200, 200, 200, 200, 200),
    "ready": (200, 200, 200, 200, 200),
    "server": (200, 200, 200, 200, 200),
}


@pytest.mark.parametrize("action", TABLE)
async def test_both_faces_enforce_the_same_access_table(faces: BothFaces, action: str) -> None:
    """Without valid credentials 401, without permission 403, over REST as over gRPC; an unknown model is answered like one
    that the caller may not call; liveness and readiness need no credentials."""
    (method, path, content), (call, message) = ACTIONS[action]

    for token, expected in zip((None, "wrong", USER, ADMIN, BOTH), TABLE[action], strict=True):
        over_rest = await faces.rest(method, path, token, json=content)
        over_grpc = await faces.grpc(call, message, token)

        assert over_rest.status_code == expected, (token, over_rest.text)
        code = over_grpc.code() if isinstance(over_grpc, grpc.aio.AioRpcError) else grpc.StatusCode.OK
        assert code is STATUSES[expected], token


async def test_who_loads_and_unloads_is_written_for_auditors(faces: BothFaces) -> None:
    """The caller, where the call came from, and whether it was allowed; also attempts without valid credentials."""
    attempts = [("load open-1", ADMIN), ("unload open-1", ADMIN), ("load open-1", USER), ("load open-1", "wrong")]
    with capture_logs() as lines:
        for action, token in attempts:
            (method, path, content), (call, message) = ACTIONS[action]
            await faces.rest(method, path, token, json=content, headers={"x-forwarded-for": "192.0.2.7"})
            await faces.grpc(call, message, token)

    written = [line for line in lines if line["event"] == "audit"]
    expected = (
        ("load", "admin", "open-1", "OK"), ("unload", "admin", "open-1", "OK"), ("load", "team", "open-1", "PERMISSION_DENIED"),
    )  # fmt: skip
    for protocol, refused_model in (("rest", "open-1"), ("grpc", "")):
        found = [line for line in written if line["protocol"] == protocol]
        facts = [(line["verb"], line["principal"], line["model"], line["result"]) for line in found]
        assert facts == [*expected, ("load", "", refused_model, "UNAUTHENTICATED")]
        assert all(line["source"].startswith("127.0.0.1:") for line in found)
    assert {line.get("forwarded_for") for line in written} == {"192.0.2.7", None}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/models/secret:predict"),
        ("GET", "/v1/models/secret"),
        ("GET", "/v1/models"),
        ("GET", "/v2/models"),
        ("GET", "/v2/models/secret/ready"),
        ("GET", "/v2/models/secret/versions/1.1"),
        ("POST", "/v2/models/secret/versions/1.1/infer"),
        ("HEAD", "/v2/models/secret"),
    ],
)
async def test_no_path_bypasses_the_access_check(faces: BothFaces, method: str, path: str) -> None:
    """Every path that is not listed as open requires valid credentials."""
    body = ROW if "infer" in path else {"instances": [1]} if method == "POST" else None

    assert (await faces.rest(method, path, json=body)).status_code == 401
    if "secret" in path:
        assert (await faces.rest(method, path, USER, json=body)).status_code == 403


@pytest.mark.parametrize(
    "path", ["/v2/../v2/repository/index", "//v2/repository/index", "/V2/repository/index", "/v2/repository/index/",
             "/v2/repository/models/%2e%2e/load", "/v2%2frepository%2findex"],
)  # fmt: skip
async def test_another_spelling_of_a_path_does_not_bypass_the_access_check(faces: BothFaces, path: str) -> None:
    """Not found, or refused; never executed."""
    answer = await faces.rest("POST", path, content=b"{}")

    assert answer.status_code in (401, 403, 404)
    assert faces.backend.controlled == []


async def test_the_index_lists_only_models_that_the_caller_may_call(faces: BothFaces) -> None:
    """An operator sees all of them."""
    names = {token: (await faces.rest("GET", "/v2/models", token)).json()["models"] for token in (USER, ADMIN)}

    assert names == {USER: ["open-1"], ADMIN: ["open-1", "secret"]}


async def test_access_errors_reveal_only_how_to_authenticate(faces: BothFaces) -> None:
    """RFC 6750's challenge; the same message for every wrong token."""
    missing = await faces.rest("GET", "/v2/models")
    forbidden = await faces.rest("GET", "/v2/models/secret", USER)
    wrong = [
        (await faces.rest("GET", "/v2/models", token)).text
        for token in ("wrong", signed(exp=1), signed(OTHER_KEY), signed(aud="other"))
    ]

    assert missing.headers["www-authenticate"] == 'Bearer realm="splitserve"'
    assert forbidden.headers["www-authenticate"] == 'Bearer realm="splitserve", error="insufficient_scope"'
    assert len(set(wrong)) == 1
    assert json.loads(wrong[0]) == {"error": auth.WRONG_CREDENTIALS, "reason": "UNAUTHENTICATED", "stage": "proxy"}


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", f"Basic {USER}")],
        [("authorization", "Bearer")],
        [("authorization", USER)],
        [("authorization", f"Bearer {USER}"), ("authorization", f"Bearer {USER}")],
        [("authorization", "Bearer " + "x" * 9000)],
        [("authorization", "Bearer \xff\xfe")],
    ],
)
async def test_credentials_of_another_scheme_are_refused(faces: BothFaces, headers: list[tuple[str, str]]) -> None:
    """One header, the scheme Bearer, a token of at most 8 KiB."""
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]

    answer = await faces._client.get("/v2/models", headers=raw)

    assert answer.status_code == 401


async def test_a_token_in_the_url_is_ignored(faces: BothFaces) -> None:
    """URLs end up in logs."""
    assert (await faces.rest("GET", f"/v2/models?access_token={BOTH}")).status_code == 401


async def test_without_credentials_the_body_is_not_read(faces: BothFaces) -> None:
    """A request without credentials is refused before its body is read."""
    assert (await faces.rest("POST", "/v2/models/open-1/infer", content=b"no JSON")).status_code == 401
    answer = await faces.grpc("ModelInfer", pb.ModelInferRequest(model_name="open-1"))
    assert answer.code() is grpc.StatusCode.UNAUTHENTICATED
    assert faces.backend.requests == []


async def test_without_credentials_readiness_names_no_models(faces: BothFaces) -> None:
    """The reason is for callers with credentials, and for the log."""
    faces.backend.not_ready = ""
    faces.backend.states[:] = []
    await faces.rest("POST", "/v2/repository/models/open-1/load", ADMIN, content=b"{}")

    nobody = await faces.rest("GET", "/v2/health/ready")
    somebody = await faces.rest("GET", "/v2/health/ready", USER)

    assert (nobody.status_code, nobody.json()["error"]) == (503, "not ready")
    assert somebody.json()["error"] != "not ready"


async def test_web_pages_cannot_load_and_unload(faces: BothFaces) -> None:
    """Browsers send the page's origin; pages may not load or unload."""
    answer = await faces.rest("POST", "/v2/repository/models/open-1/load", ADMIN, headers={"origin": "http://evil"}, json={})

    assert answer.status_code == 403
    assert faces.backend.controlled == []


@pytest.mark.parametrize(
    ("claims", "may_call", "is_operator"),
    [
        ({}, {"open-1"}, False),
        ({"sub": "other"}, set(), False),
        ({"roles": ["reader", "operator"]}, {"open-1"}, True),
        ({"scope": "read call"}, {"open-1", "secret"}, False),
        ({"sub": None, "scope": "recall"}, set(), False),
    ],
)
async def test_claims_give_rights(auth_file: Path, claims: dict[str, Any], may_call: set[str], is_operator: bool) -> None:
    """Every grant whose claims match adds to the bearer's permissions."""
    caller = await caller_of(BearerAuthenticator(str(auth_file)), f"Bearer {signed(**claims)}")

    assert {model for model in ("open-1", "secret") if caller.may_call(model)} == may_call
    assert caller.is_operator is is_operator


async def test_no_two_callers_own_the_same(auth_file: Path) -> None:
    """However alike their names begin, whatever characters they have, and although a listed token has the same name."""
    subjects = ["ann", "a" * 64 + "1", "a" * 64 + "2", "b" * 5000 + "1", "b" * 5000 + "2", "x\0y", "jwt", "None"]
    rewrite(auth_file, {"tokens": [listed("ann", "token")], "jwt": JWT})
    authenticator = BearerAuthenticator(str(auth_file))

    owners = [(await caller_of(authenticator, f"Bearer {signed(sub=subject)}")).owner for subject in subjects]
    owners.append((await caller_of(authenticator, "Bearer token")).owner)

    assert len(set(owners)) == len(owners)
    assert (owners[0], owners[-1]) == ("jwt:ann", "ann")
    assert all(owner.isprintable() and 0 < len(owner) < 300 for owner in owners)
    assert (await caller_of(authenticator, f"Bearer {signed(sub=None)}")).owner == ""


@pytest.mark.parametrize(
    "token",
    [
        signed(exp=1),
        signed(exp=None),
        signed(aud="other"),
        signed(aud=None),
        signed(iss="https://evil.example"),
        signed(iss=None),
        signed(nbf=time.time() + 86_400),
        signed(OTHER_KEY),
        signed(key_id="2"),
        signed(algorithm="RS512"),
        signed("x" * 64, algorithm="HS256"),
        jwt.encode({"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 600}, None, "none", headers={"kid": "1"}),
        signed()[:-4] + "AAAA",
        "a.b.c",
        "..",
        "e30.e30.",
    ],
    ids=[
        "expired",
        "no expiry",
        "another audience",
        "no audience",
        "another issuer",
        "no issuer",
        "not yet",
        "another key",
        "unknown key",
        "another algorithm",
        "a shared secret",
        "no algorithm",
        "another signature",
        "no JSON",
        "empty",
        "no claims",
    ],
)
async def test_an_invalid_jwt_is_refused(auth_file: Path, token: str) -> None:
    """Expired, of another audience, issuer or algorithm, unsigned, or not a JWT."""
    with pytest.raises(Unauthenticated):
        await caller_of(BearerAuthenticator(str(auth_file)), f"Bearer {token}")


@pytest.mark.parametrize(
    ("key", "algorithm"), [(ec.generate_private_key(ec.SECP256R1()), "ES256"), (ed25519.Ed25519PrivateKey.generate(), "EdDSA")]
)
async def test_keys_of_other_algorithms_are_accepted(auth_file: Path, key: Any, algorithm: str) -> None:
    """Elliptic curves and Edwards curves, besides RSA."""
    (auth_file.parent / "keys.json").write_text(key_set(k=key))

    caller = await caller_of(BearerAuthenticator(str(auth_file)), f"Bearer {signed(key, 'k', algorithm)}")

    assert caller.name == "team-a"


async def test_a_verified_jwt_is_cached_for_a_while(monkeypatch: pytest.MonkeyPatch, auth_file: Path) -> None:
    """A verified token is cached until it expires or the file changes."""
    checks = 0
    decode = jwt.decode

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal checks
        checks += 1
        return decode(*arguments, **options)

    monkeypatch.setattr(jwt, "decode", counting)
    authenticator = BearerAuthenticator(str(auth_file))
    lasting, expired = f"Bearer {signed()}", f"Bearer {signed(exp=time.time() - 10)}"  # within the leeway, for a moment

    for _ in range(3):
        await caller_of(authenticator, lasting)
    assert checks == 1
    remembered = next(iter(authenticator._remembered.values()))[1] - time.monotonic()
    assert 0 < remembered <= auth.REMEMBERED_S
    with pytest.raises(Unauthenticated):
        await caller_of(authenticator, expired)
    rewrite(auth_file, {"jwt": JWT})
    await authenticator.refresh()
    await caller_of(authenticator, lasting)
    assert checks == 3


async def test_a_changed_authorization_file_is_reloaded(faces: BothFaces, auth_file: Path) -> None:
    """A removed token is refused, a new one accepted; an invalid file changes nothing."""
    assert (await faces.rest("GET", "/v2/models", USER)).status_code == 200

    rewrite(auth_file, {"tokens": [listed("new", "new-token")]})

    async with asyncio.timeout(20):
        while (await faces.rest("GET", "/v2/models", USER)).status_code == 200:
            pass
    assert (await faces.rest("GET", "/v2/models", "new-token")).status_code == 200
    rewrite(auth_file, "broken")
    assert faces.faces.authenticator is not None
    await faces.faces.authenticator.refresh()
    assert (await faces.rest("GET", "/v2/models", "new-token")).status_code == 200


class KeyServer:
    """Keys at a URL that a test can replace."""

    def __init__(self) -> None:
        self.keys = key_set(**{"1": KEY})
        self.n_asked = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.n_asked += 1
                self.send_response(200)
                self.end_headers()
                self.wfile.write(server.keys.encode())

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/keys"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()  # polls for shutdown

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def key_server() -> Iterator[KeyServer]:
    server = KeyServer()
    yield server
    server.close()


def with_url(auth_file: Path, url: str) -> BearerAuthenticator:
    auth_file.write_text(json.dumps({"jwt": {**JWT, "jwks": url}}))
    return BearerAuthenticator(str(auth_file))


async def test_keys_are_fetched_from_a_url(monkeypatch: pytest.MonkeyPatch, auth_file: Path, key_server: KeyServer) -> None:
    """An unknown key is fetched, but not once for every token that names one."""
    authenticator = with_url(auth_file, key_server.url)
    await caller_of(authenticator, f"Bearer {signed()}")
    for _ in range(5):
        with pytest.raises(Unauthenticated):
            await caller_of(authenticator, f"Bearer {signed(OTHER_KEY, '2')}")
    assert key_server.n_asked == 1

    key_server.keys = key_set(**{"2": OTHER_KEY})
    later = time.monotonic() + auth.KEYS_RETRY_S + 1
    monkeypatch.setattr(auth.time, "monotonic", lambda: later)

    assert (await caller_of(authenticator, f"Bearer {signed(OTHER_KEY, '2')}")).name == "team-a"
    with pytest.raises(Unauthenticated):  # remembered no longer: its key is gone
        await caller_of(authenticator, f"Bearer {signed()}")
    assert key_server.n_asked == 2


async def test_keys_that_cannot_be_fetched_are_not_the_callers_fault(auth_file: Path) -> None:
    """UNAVAILABLE, which clients retry; 401 would make them get another token."""
    async with opened(auth_file) as faces:
        assert faces.faces.authenticator is not None
        rewrite(auth_file, {"tokens": TOKENS, "jwt": {**JWT, "jwks": "http://127.0.0.1:1/keys"}})
        await faces.faces.authenticator.refresh()

        signed_one = await faces.rest("GET", "/v2/models", signed())

        assert (signed_one.status_code, signed_one.headers["retry-after"]) == (503, "1")
        assert (await faces.rest("GET", "/v2/models", USER)).status_code == 200


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "truncated"),
        ('{"token": []}', "unknown field `token`"),
        ('{"tokens": [{"name": "a", "sha256": "short"}]}', "$.tokens[0].sha256"),
        (json.dumps({"tokens": [TOKENS[0], TOKENS[0]]}), "expected each token once"),
        (json.dumps({"jwt": {**JWT, "algorithms": ["HS256"]}}), "HS256"),
        (json.dumps({"jwt": {**JWT, "audience": ""}}), "audience"),
        (json.dumps({"jwt": {**JWT, "jwks": "http://issuer.example/keys"}}), "https"),
        (json.dumps({"jwt": {**JWT, "jwks": "auth.json"}}), "JSON Web Key Set"),
        (json.dumps({"jwt": {**JWT, "jwks": "nowhere.json"}}), "nowhere.json"),
    ],
)
def test_an_invalid_authorization_file_stops_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], auth_file: Path, content: str, said: str
) -> None:
    """Before anything is bound, naming the setting and what is wrong."""
    auth_file.write_text(content)
    monkeypatch.setenv("PROXY_AUTH_FILE", str(auth_file))

    with pytest.raises(SystemExit) as raised:
        settings.read(ProxySettings)

    error = capsys.readouterr().err
    assert raised.value.code == 2
    assert error.startswith("PROXY_AUTH_FILE: ")
    assert said in error


async def test_neither_tokens_nor_payloads_are_logged(faces: BothFaces, capsys: pytest.CaptureFixture[str]) -> None:
    """The log line of a request has caller, call and duration, whatever the outcome, and never the payload."""
    secret = signed()
    payload = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [31337.5]}]}
    for token in (USER, secret, "wrong-one", signed(exp=1)):
        await faces.rest("POST", "/v2/models/open-1/infer", token, json=payload)
        await faces.rest("POST", "/v2/models/open-1/infer", token, content=b'{"inputs": "31337.5"}')
        await faces.grpc("ModelInfer", infer_message("open-1"), token)

    out = capsys.readouterr()
    written = out.out + out.err
    assert "team" in written
    for private in (USER, secret, "wrong-one", "31337", secret.rpartition(".")[2], hashlib.sha256(USER.encode()).hexdigest()):
        assert private not in written


async def test_a_recognised_caller_is_served_without_a_task(faces: BothFaces) -> None:
    """A listed token and a verified JWT are recognised at once, so that no task is needed."""
    released = asyncio.Event()
    answer = faces.backend.infer

    async def held(request: Any) -> Any:
        response = await answer(request)
        await released.wait()
        return response

    faces.backend.infer = held  # type: ignore[method-assign]
    token = signed()
    url, headers = faces.faces.http.port, [f"Authorization: Bearer {each}" for each in (USER, token)]
    assert (await faces.rest("GET", "/v2/models", token)).status_code == 200  # verified now
    body = json.dumps(ROW).encode()
    before = set(asyncio.all_tasks())
    connections = []
    for header in headers * 3:
        reader, writer = await asyncio.open_connection("127.0.0.1", url)
        head = f"POST /v2/models/open-1/infer HTTP/1.1\r\nHost: x\r\n{header}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        connections.append((reader, writer))
    async with asyncio.timeout(10):
        while sum(faces.service.batcher.occupancy("open-1")) < len(connections) or not faces.backend.requests:  # noqa: ASYNC110
            await asyncio.sleep(0)

    n_tasks, (_, n_calls) = len(set(asyncio.all_tasks()) - before), faces.service.batcher.occupancy("open-1")
    released.set()

    assert n_tasks == n_calls
    for reader, writer in connections:
        assert (await reader.readline()).split()[1] == b"200"
        writer.close()


async def test_every_line_of_an_inference_names_its_caller(
    auth_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of several callers that are merged into one call are logged with their own caller each."""
    monkeypatch.setattr(logs.RequestLog, "every", 1)
    async with opened(auth_file) as faces:
        calls = [faces.grpc("ModelInfer", infer_message("open-1"), token) for token in (USER, BOTH, signed(), USER, BOTH)]
        answers = await asyncio.gather(*calls)

    assert not [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    lines = [line for line in capsys.readouterr().out.splitlines() if " infer " in line]
    assert sorted(re.findall(r"caller=(\S+)", "\n".join(lines))) == ["both", "both", "team", "team", "team-a"]
