"""The admin listener over a real socket: paths, who may ask, the Host header, and that scrapes harm nothing."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import trustme
from pydantic import ValidationError

from predict_service.settings import PredictSettings
from splitserve.server import logs
from splitserve.server.admin import AdminApp, AdminListener, app_of, listen_for_admin
from splitserve.telemetry.registry import Family, Snapshot
from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.http1.messages import HttpRequest, RequestBody
from tests.certificates import write

COUNT = Family("made_total", "counter", "Made.")
TOKEN = "0123456789abcdef"
CREDENTIALS = {"authorization": f"Bearer {TOKEN}"}


class Fake:
    """Implements `splitserve.server.admin.Administered`."""

    def __init__(self) -> None:
        self.families: Mapping[str, Family] = {COUNT.name: COUNT}
        self.reason = ""
        self.n_snapshots = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def snapshot(self) -> Snapshot:
        self.n_snapshots += 1
        await self.may_answer.wait()
        return {COUNT.name: {(): self.n_snapshots}}

    async def not_ready_reason(self) -> str:
        return self.reason

    async def set_log_level(self, level: logs.Level) -> None:
        logs.LogLevel.set(level)


class Admin:
    """A listener and a client of it."""

    def __init__(self, of: Fake, port: int, client: httpx.AsyncClient) -> None:
        self.of, self.port, self.client = of, port, client

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(path, headers=headers)


@pytest.fixture
async def admin(request: pytest.FixtureRequest) -> AsyncIterator[Admin]:
    options: dict[str, Any] = getattr(request, "param", {})
    of, listening = Fake(), socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    async with (
        AdminListener(AdminApp(of, **options), listening),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False, timeout=60) as client,
    ):
        yield Admin(of, port, client)


async def test_readiness_has_the_reason(admin: Admin) -> None:
    """An orchestrator sees the status, an operator why."""
    ready = await admin.get("/readyz")
    admin.of.reason = "models are still being loaded"
    not_ready, live = await admin.get("/readyz"), await admin.get("/livez")

    assert (ready.status_code, ready.json()) == (200, {"ready": True})
    assert (not_ready.status_code, not_ready.json()["reason"]) == (503, "models are still being loaded")
    assert live.status_code == 200


HELD = {
    "new": b"",
    "half a request": b"GET /metrics HTTP/1.1\r\nHost: x",
    "idle": b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "half a body": b"PUT /log-level HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx",
}


@pytest.mark.parametrize("sent", HELD.values(), ids=HELD)
async def test_connections_that_are_held_open_do_not_keep_probes_out(admin: Admin, sent: bytes) -> None:
    """An orchestrator would take the service for dead: the connection that waits longest for its client is closed instead."""
    held = []
    for _ in range(100):
        reader, writer = await asyncio.open_connection("127.0.0.1", admin.port)
        writer.write(sent)
        held.append((reader, writer))

    assert [(await admin.client.get("/livez", headers={"connection": "close"})).status_code for _ in range(3)] == [200] * 3
    await held[0][0].read()  # to the end: it was closed
    for _, writer in held:
        writer.close()


async def test_the_format_is_what_the_scraper_asks_for(admin: Admin) -> None:
    """Prometheus asks for OpenMetrics by the Accept header; a person with a browser gets plain text."""
    plain = await admin.get("/metrics")
    openmetrics = await admin.get("/metrics", accept="application/openmetrics-text; version=1.0.0,text/plain;q=0.5")

    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "made_total 1.0" in plain.text
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8002", "10.0.0.7:8002", "proxy:8002", "named.example", ""])
@pytest.mark.parametrize("admin", [{"allowed_hosts": frozenset({"named.example"})}], indirect=True)
async def test_addresses_and_bare_names_are_ours(admin: Admin, host: str) -> None:
    """No web page has such an origin, so that no rebound name can have them. Only browsers always send one."""
    assert (await admin.get("/metrics", host=host)).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8002", "localhost.evil.example", "a@b", "a b"])
async def test_names_of_other_sites_are_refused(admin: Admin, host: str) -> None:
    """A browser sends such a Host when a page's name was rebound to this machine (DNS rebinding)."""
    assert (await admin.get("/metrics", host=host)).status_code in (400, 421)
    assert admin.of.n_snapshots == 0


@pytest.mark.parametrize("admin", [{"token": TOKEN}], indirect=True)
async def test_a_token_protects_all_but_the_probes(admin: Admin) -> None:
    """Probes of an orchestrator have no secret."""
    assert [(await admin.get(path)).status_code for path in ("/metrics", "/version", "/log-level")] == [401] * 3
    assert (await admin.get("/metrics", authorization="Bearer fedcba9876543210")).status_code == 401
    assert (await admin.get("/metrics", authorization=f"Bearer {TOKEN}")).status_code == 200
    assert [(await admin.get(path)).status_code for path in ("/livez", "/readyz")] == [200, 200]


async def test_changes_need_a_token_that_is_configured(admin: Admin) -> None:
    """Loopback is shared with every user and web page of the machine."""
    answer = await admin.client.put("/log-level", json={"level": "debug"}, headers=CREDENTIALS)

    assert answer.status_code == 403
    assert "ADMIN_TOKEN_FILE" in answer.json()["error"]


def test_no_line_is_made_of_a_request_that_the_level_would_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the level warning nothing is put together for requests that succeed."""
    for name in ("current", "_least"):
        monkeypatch.setattr(logs.LogLevel, name, getattr(logs.LogLevel, name))
    monkeypatch.setattr(logs.RequestLog, "every", logs.RequestLog.every)
    taken = {}

    for level in ("warning", "info"):
        logs.LogLevel.set(level)
        taken[level] = logs.RequestLog.takes()

    assert taken == {"warning": False, "info": True}


@pytest.mark.parametrize("admin", [{"token": TOKEN}], indirect=True)
async def test_the_log_level_changes_at_run_time(
    admin: Admin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for loggers that have written before, which are cached."""
    monkeypatch.setattr(logs.LogLevel, "current", "info")
    monkeypatch.setattr(logs.LogLevel, "_least", logs.LogLevel._least)
    logger = structlog.wrap_logger(
        structlog.WriteLogger(), processors=[logs.LogLevel.keep, structlog.processors.KeyValueRenderer()]
    )
    logger.debug("first")

    without = await admin.client.put("/log-level", json={"level": "debug"})
    wrong = await admin.client.put("/log-level", json={"level": "loud"}, headers=CREDENTIALS)
    changed = await admin.client.put("/log-level", json={"level": "debug"}, headers=CREDENTIALS)
    logger.debug("second")

    assert (without.status_code, wrong.status_code, changed.status_code) == (401, 400, 200)
    assert (await admin.get("/log-level", **CREDENTIALS)).json() == {"level": "debug"}
    assert "second" in (written := capsys.readouterr().out)
    assert "first" not in written


@pytest.mark.parametrize("admin", [{"token": TOKEN}], indirect=True)
async def test_changes_and_attempts_are_written_for_auditors(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the address that they came from, and what it was before."""
    for name in ("current", "_least"):
        monkeypatch.setattr(logs.LogLevel, name, getattr(logs.LogLevel, name))
    with structlog.testing.capture_logs() as lines:
        await admin.client.put("/log-level", json={"level": "error"})
        await admin.client.put("/log-level", json={"level": "loud"}, headers=CREDENTIALS)
        await admin.client.put("/log-level", json={"level": "error"}, headers=CREDENTIALS)

    written = [line for line in lines if line["event"] == "audit"]
    assert [(line["verb"], line["principal"], line["result"]) for line in written] == [
        ("set log level", "", "UNAUTHENTICATED"), ("set log level", "admin token", "INVALID_ARGUMENT"),
        ("set log level", "admin token", "OK"),
    ]  # fmt: skip
    assert (written[-1]["before"], written[-1]["after"]) == ("info", "error")
    assert all(line["source"].startswith("127.0.0.1:") for line in written)


def test_lines_for_auditors_pass_every_log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise who raises the level would hide what follows."""
    for name in ("current", "_least"):
        monkeypatch.setattr(logs.LogLevel, name, getattr(logs.LogLevel, name))
    monkeypatch.setattr(logs.RequestLog, "every", logs.RequestLog.every)
    logs.LogLevel.set("error")

    assert logs.LogLevel.keep(None, "info", {"event": "audit"}) == {"event": "audit"}
    with pytest.raises(structlog.DropEvent):
        logs.LogLevel.keep(None, "info", {"event": "ready"})


async def test_other_paths_and_methods_are_refused(admin: Admin) -> None:
    """As HTTP has it."""
    assert (await admin.get("/")).status_code == 404
    refused = await admin.client.post("/metrics")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET")


async def test_scrapes_at_the_same_time_share_one_rendering() -> None:
    """Ten scrapers cost as much as one."""
    of = Fake()
    of.may_answer.clear()
    app = AdminApp(of)

    async def scrape() -> Any:
        request = HttpRequest(0, RequestBody(0, ByteBudget(0)), "GET", "/metrics", {b"host": b"localhost"})
        return await app.answer(request, lambda _: None)  # type: ignore[misc]  # a coroutine

    scrapes = [asyncio.create_task(scrape()) for _ in range(10)]
    while not of.n_snapshots:  # noqa: ASYNC110, a fake counts; the scrapes began in one iteration of the loop
        await asyncio.sleep(0)
    of.may_answer.set()
    answers = await asyncio.gather(*scrapes)

    assert {answer.status for answer in answers} == {200}
    assert of.n_snapshots == 1


async def test_scrapers_that_leave_harm_nothing(admin: Admin) -> None:
    """Closed in the middle a hundred times; the next scrape is answered."""
    for _ in range(100):
        _, writer = await asyncio.open_connection("127.0.0.1", admin.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await writer.drain()
        writer.transport.abort()

    assert (await admin.get("/metrics")).status_code == 200


def test_a_port_that_is_taken_names_the_setting() -> None:
    """Two services of one kind on a machine: the second says what to change."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"127.0.0.1:{port}.*PREDICT_ADMIN_PORT"):
            listen_for_admin(PredictSettings(admin_port=port))


def test_the_listener_can_be_off() -> None:
    """Then nothing is bound."""
    assert listen_for_admin(PredictSettings(admin_port="off")) is None


@pytest.mark.parametrize("port", ["none", "OFF", "", "-1", "65536", "8002.5", -1, 65536, None])
def test_what_is_no_port_is_refused_by_one_line(port: Any) -> None:
    """With what is expected, and nothing of how it is checked."""
    with pytest.raises(ValidationError) as refused:
        PredictSettings(admin_port=port)

    assert [error["msg"] for error in refused.value.errors()] == [
        f'Value error, expected a port up to 65535, 0 for any free one, or "off", got "{port}"'
    ]


def test_ports_may_come_as_text() -> None:
    """From the environment they do."""
    assert [PredictSettings(admin_port=port).admin_port for port in ("0", "8002", 65535, "off")] == [0, 8002, 65535, "off"]


def test_a_token_is_a_secret_or_refused(tmp_path: Path) -> None:
    """An empty or short file protects nothing."""
    file = tmp_path / "token"
    file.write_text("short\n")
    with pytest.raises(ValidationError, match="16 characters"):
        PredictSettings(admin_token_file=str(file))

    file.write_text(f"{TOKEN}\n")
    config = PredictSettings(admin_token_file=str(file), admin_host="admin.example")

    assert app_of(config, Fake())._token == TOKEN.encode()
    assert app_of(config, Fake())._allowed_hosts == {"admin.example"}


async def test_variables_of_prometheus_change_nothing(admin: Admin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """prometheus_client's mode for several processes reads a folder of files, which may be another program's."""
    (tmp_path / "counter_1.db").write_bytes(b"of another program")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))

    assert "made_total 1.0" in (await admin.get("/metrics")).text


async def test_it_has_tls_of_its_own(tmp_path: Path) -> None:
    """Independent of the service's ports."""
    files = write(tmp_path / "admin", trustme.CA())
    config = PredictSettings(admin_port=0, admin_tls_cert_file=files.cert, admin_tls_key_file=files.key)
    listening = listen_for_admin(config)
    assert listening is not None
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    trusting = ssl.create_default_context(cafile=files.ca)

    async with (
        AdminListener(app_of(config, Fake()), listening, config),
        httpx.AsyncClient(verify=trusting, trust_env=False, timeout=60) as client,
    ):
        assert (await client.get(f"https://{address}/livez")).status_code == 200
        with pytest.raises(httpx.HTTPError):
            await client.get(f"http://{address}/livez")
