"""The admin listener: what operators and their monitoring ask of a process, on a port of its own.

| path | answer |
|---|---|
| ``GET /metrics`` | Prometheus text, or OpenMetrics if ``Accept`` asks for it |
| ``GET /livez`` | 200 while the process answers |
| ``GET /readyz`` | 200, or 503 with the reason |
| ``GET /version`` | of splitserve and Python |
| ``GET /log-level``, ``PUT /log-level`` | ``{"level": "debug"}`` |

A request whose ``Host`` is the name of another site is refused: a web page could have made a browser send it (DNS rebinding).
Browsers always send one; probes of load balancers that speak HTTP/1.0 may have none.
What changes something requires a token always, the rest if one is configured, except the two probes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import os
import platform
import re
import socket
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, cast, get_args

import msgspec

from splitserve import __version__
from splitserve.server import audit, logs
from splitserve.server.admin_settings import AdminSettings
from splitserve.server.certificate_metrics import CertificateMetrics
from splitserve.server.lifecycle import background
from splitserve.server.metrics import Metrics
from splitserve.server.settings import ServiceSettings, variable_name
from splitserve.server.tls import following_ssl_context
from splitserve.server.workers import SOCKETS_VARIABLE, own_place
from splitserve.telemetry.process import Beats
from splitserve.telemetry.registry import Family, Labels, Snapshot, Value
from splitserve.telemetry.rendering import Renderer
from splitserve.wire.http1.connection import Http1Connection
from splitserve.wire.http1.listener import HttpLimits, HttpListener, json_error
from splitserve.wire.http1.messages import BodyTooLarge, Handled, HttpRequest, HttpResponse, Respond
from splitserve.wire.listening import Acceptor, listen

if TYPE_CHECKING:
    from splitserve.server.lifecycle import ServiceProcess

_LIMITS = HttpLimits(max_connections=64, drops_waiting=True)
"""Connections that others keep open must not make a service look dead to its orchestrator."""

_MAX_BODY_BYTES = 1024
_PROBES = ("/livez", "/readyz")

_BARE_NAME = re.compile(r"[a-z0-9_-]+")
"""A name without a dot, as of a host in the same network, or of compose."""

FOLLOW_INTERVAL_S = 1.0

ADMIN = "admin token"
"""The principal of who presents the token of an admin listener."""


class Administered(Protocol):
    """What an admin listener tells of, and changes."""

    @property
    def families(self) -> Mapping[str, Family]: ...

    async def snapshot(self) -> Snapshot:
        """The metrics of now."""
        ...

    async def not_ready_reason(self) -> str:
        """Why it is not ready; "" if it is."""
        ...

    async def set_log_level(self, level: logs.Level) -> None:
        """From now on."""
        ...


class _LogLevel(msgspec.Struct):
    level: logs.Level


Handler = Callable[[HttpRequest], Awaitable[HttpResponse]]


class AdminApp:
    """Answers the requests to an admin listener.

    Args:
        of: what it tells of.
        token: that callers must present; "": none is configured.
        allowed_hosts: names that the Host header may have, besides addresses and names without a dot.
        more: further paths for GET.
    """

    def __init__(
        self,
        of: Administered,
        *,
        token: str = "",
        allowed_hosts: frozenset[str] = frozenset(),
        more: Mapping[str, Handler] | None = None,
    ) -> None:
        self._of = of
        self._token = token.encode()
        self._allowed_hosts = allowed_hosts
        self._renderer = Renderer(of.families)
        self._scrapes: dict[str, asyncio.Task[tuple[bytes, str]]] = {}
        self._handlers: dict[tuple[str, str], Handler] = {
            ("GET", "/metrics"): self._metrics,
            ("GET", "/livez"): self._live,
            ("GET", "/readyz"): self._ready,
            ("GET", "/version"): self._version,
            ("GET", "/log-level"): self._log_level,
            ("PUT", "/log-level"): self._set_log_level,
            **{("GET", path): handler for path, handler in (more or {}).items()},
        }

    def answer(self, request: HttpRequest, respond: Respond) -> Handled:
        """Begin to answer."""
        host = request.header(b"host") or ""
        if host and not self._is_ours(host):
            return json_error(421, f"Host {host[:64]!r} is not served here; ADMIN_ALLOWED_HOSTS can add a name")
        method = "GET" if request.method == "HEAD" else request.method
        handler = self._handlers.get((method, request.path))
        if handler is None:
            allowed = [known for known, path in self._handlers if path == request.path]
            if not allowed:
                return json_error(404, "Not Found")
            refusal = json_error(405, f"{method[:16]} is not allowed for this path")
            return msgspec.structs.replace(refusal, headers=(("allow", ", ".join(allowed)),))
        if method != "GET" and not self._token:
            _audit_log_level(request, "PERMISSION_DENIED")
            return json_error(403, "changes require a token, and none is configured (ADMIN_TOKEN_FILE)")
        if (method != "GET" or request.path not in _PROBES) and not self._is_allowed(request):
            if method != "GET":
                _audit_log_level(request, "UNAUTHENTICATED")
            refusal = json_error(401, "expected the token of ADMIN_TOKEN_FILE as Authorization: Bearer")
            return msgspec.structs.replace(refusal, headers=(("www-authenticate", 'Bearer realm="admin"'),))
        return handler(request)  # type: ignore[return-value]  # every handler is a coroutine function

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header can only come from who knows this listener: no other site has an address, or a bare name."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return _BARE_NAME.fullmatch(name) is not None or name in self._allowed_hosts
        return True

    def _is_allowed(self, request: HttpRequest) -> bool:
        scheme, _, token = (request.headers.get(b"authorization") or b"").partition(b" ")
        return not self._token or (scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token))

    async def _metrics(self, request: HttpRequest) -> HttpResponse:
        """Scrapes that come at the same time share one rendering."""
        accept = request.header(b"accept") or ""
        scrape = self._scrapes.get(accept)
        if scrape is None:
            scrape = self._scrapes[accept] = asyncio.create_task(self._scrape(accept))
            scrape.add_done_callback(lambda _: self._scrapes.pop(accept))
        text, media_type = await asyncio.shield(scrape)
        return HttpResponse(200, text, media_type)

    async def _scrape(self, accept: str) -> tuple[bytes, str]:
        return await self._renderer.render(await self._of.snapshot(), accept)

    async def _live(self, request: HttpRequest) -> HttpResponse:
        return _json(200, {"live": True})

    async def _ready(self, request: HttpRequest) -> HttpResponse:
        reason = await self._of.not_ready_reason()
        return _json(503, {"ready": False, "reason": reason}) if reason else _json(200, {"ready": True})

    async def _version(self, request: HttpRequest) -> HttpResponse:
        return _json(200, {"version": __version__, "python": platform.python_version()})

    async def _log_level(self, request: HttpRequest) -> HttpResponse:
        return _json(200, {"level": logs.LogLevel.current})

    async def _set_log_level(self, request: HttpRequest) -> HttpResponse:
        try:
            level = msgspec.json.decode(await request.body.read(), type=_LogLevel).level
        except (msgspec.DecodeError, BodyTooLarge):
            _audit_log_level(request, "INVALID_ARGUMENT")
            return json_error(400, f'expected {{"level": …}} with one of {", ".join(get_args(logs.Level))}')
        before = logs.LogLevel.current
        await self._of.set_log_level(level)
        _audit_log_level(request, "OK", after=level, before=before)
        return _json(200, {"level": level})


class AdminListener:
    """Listens while entered.

    Args:
        app: answers.
        socket: that listens already.
        config: has the files of TLS; None: plain text.
    """

    def __init__(self, app: AdminApp, socket: socket.socket, config: AdminSettings | None = None) -> None:
        self._listener = HttpListener(app.answer, _LIMITS, max_body_bytes=_MAX_BODY_BYTES)
        tls = config.admin_tls if config else None
        context = following_ssl_context(tls, "http/1.1") if tls else None
        self._acceptor = Acceptor(socket, lambda: Http1Connection(self._listener), context)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> AdminListener:
        self._acceptor.start()
        await self._stack.enter_async_context(background(self._listener.keep_ticking()))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._acceptor.stop()
        self._listener.drain()
        await self._listener.connections.abort()
        await self._stack.aclose()


def listen_for_admin(config: ServiceSettings) -> socket.socket | None:
    """The listening socket of the admin port; None if it is off.

    Raises:
        SystemExit: the port cannot be bound.
    """
    if config.admin_port == "off":
        return None
    try:
        return listen(config.admin_host, config.admin_port, shares_port=False)
    except SystemExit as error:
        port, host = (variable_name(type(config), name) for name in ("admin_port", "admin_host"))
        raise SystemExit(
            f'{error}; {port} chooses the port of the admin listener: another one, 0 for any, or "off"; {host} its address'
        ) from None


def app_of(config: AdminSettings, of: Administered) -> AdminApp:
    """What answers at the admin port that is configured."""
    names = {name.strip().lower() for name in config.admin_allowed_hosts.split(",")} | {config.admin_host.lower()}
    return AdminApp(of, token=config.admin_token, allowed_hosts=frozenset(names - {""}))


class _Process:
    """Implements `Administered` for a process of one service."""

    def __init__(self, process: ServiceProcess, metrics: Metrics, not_ready_reason: Callable[[], Awaitable[str]]) -> None:
        self._process = process
        self._metrics = metrics
        self._not_ready_reason = not_ready_reason

    @property
    def families(self) -> Mapping[str, Family]:
        return self._metrics.registry.families

    async def snapshot(self) -> Snapshot:
        return await self._metrics.snapshot()

    async def not_ready_reason(self) -> str:
        return "draining" if self._process.is_draining else await self._not_ready_reason()

    async def set_log_level(self, level: logs.Level) -> None:
        logs.LogLevel.set(level)


async def open_admin(process: ServiceProcess, config: ServiceSettings, not_ready_reason: Callable[[], Awaitable[str]]) -> Metrics:
    """The metrics of this process, with its admin listener open until the process ends.

    One of several workers listens on a socket of its own, where the process asks that has the admin port.

    Raises:
        SystemExit: the port cannot be bound.
    """
    metrics = Metrics(config.latency_bounds)
    if process.spans is not None:
        metrics.add_part("spans", process.spans)
    of = _Process(process, metrics, not_ready_reason)
    listener, beats = None, None
    if config.workers > 1:
        if config.admin_port != "off":
            listener = worker_listener(of)
            beats = beats_of(_sockets_folder(), own_place()[0])
            await process.enter_async_context(background(SharedLogLevel(_sockets_folder()).keep_following()))
    elif (listening := listen_for_admin(config)) is not None:
        listener = AdminListener(app_of(config, of), listening, config)
        process.admin_ports = {"admin_port": listening.getsockname()[1]}
    if listener is not None:
        await process.enter_async_context(listener)
        metrics.add_part("certificates", CertificateMetrics(config))
        await process.enter_async_context(background(metrics.process.measure_lag(beats), metrics.keep_refreshed()))
    return metrics


def beats_of(sockets: Path, index: int) -> Beats:
    """The beats of one of several workers, which the process reads that answers for all."""
    return Beats(sockets / f"{index}.beat")


class SharedLogLevel:
    """The log level that was set for all workers of a service, in a file, for those that did not answer or are started later.

    Args:
        sockets: the folder of the workers' sockets.
    """

    def __init__(self, sockets: Path) -> None:
        self._path = sockets / "log-level"

    def set(self, level: logs.Level) -> None:
        """From now on, in this process and in all that follow it."""
        written = self._path.with_suffix(".new")
        written.write_text(level)
        written.replace(self._path)
        logs.LogLevel.set(level)

    def follow(self) -> None:
        """Set the level that was set for all, if one was."""
        with contextlib.suppress(OSError):
            level = self._path.read_text()
            if level in get_args(logs.Level) and level != logs.LogLevel.current:
                logs.LogLevel.set(cast("logs.Level", level))

    async def keep_following(self) -> None:
        """Poll every `FOLLOW_INTERVAL_S`, until cancelled."""
        while True:
            self.follow()
            await asyncio.sleep(FOLLOW_INTERVAL_S)


def _sockets_folder() -> Path:
    return Path(os.environ[SOCKETS_VARIABLE])


def worker_listener(of: Administered) -> AdminListener:
    """Of one of several workers, for the process that answers for all: `splitserve.server.worker_admin`."""
    index, _ = own_place()
    path = _sockets_folder() / f"{index}.sock"
    path.unlink(missing_ok=True)  # that of a worker that was killed
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    generation = uuid.uuid4().hex

    async def snapshot(_: HttpRequest) -> HttpResponse:
        answer = WorkerAnswer(generation, list((await of.snapshot()).items()))
        return HttpResponse(200, msgspec.msgpack.encode(answer), "application/msgpack")

    async def set_level(request: HttpRequest) -> HttpResponse:
        await of.set_log_level(cast("logs.Level", request.path.rpartition("/")[2]))
        return _json(200, {})

    levels = {f"/set-log-level/{level}": set_level for level in get_args(logs.Level)}
    return AdminListener(AdminApp(of, more={"/snapshot": snapshot, **levels}), listening)


class WorkerAnswer(msgspec.Struct, frozen=True):
    """What a worker has counted. ``generation`` is another one after each start."""

    generation: str
    snapshot: list[tuple[str, dict[Labels, Value]]]


def _audit_log_level(request: HttpRequest, result: str, **facts: str) -> None:
    """A line for auditors: the log level is the only thing that can be changed here."""
    principal = "" if result in ("UNAUTHENTICATED", "PERMISSION_DENIED") else ADMIN
    audit.record("set log level", result=result, principal=principal, source=request.address(), **facts)


def _json(status: int, content: object) -> HttpResponse:
    return HttpResponse(status, msgspec.json.encode(content))
