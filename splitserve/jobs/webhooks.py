"""Webhooks: which are allowed, how they are signed, and the sender of what is in the outbox.

1. At submit: https, a host of the allow-list, no credentials in the URL, a secret for the caller.
2. At every attempt the name is resolved, all of its addresses have to be public, and the connection is made to one of those; the
   certificate is that of the name. Redirects are not followed.
3. The stored bytes are signed and sent, with every secret of the caller, so that secrets can be replaced.
4. 2xx is success and 410 the end. Anything else is tried again with backoff for a day; Retry-After is obeyed, within limits.
5. One receiver gets few deliveries at once, so that a slow one delays only its own. An attempt has a deadline below its lease.

Source: Standard Webhooks 1.0.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpcore
import msgspec
import structlog

from splitserve.backoff import Backoff
from splitserve.errors import InvalidInput, SplitserveError
from splitserve.jobs import addresses
from splitserve.jobs.addresses import AddressRefused
from splitserve.jobs.events import host_of
from splitserve.jobs.records import Delivery, DeliveryAttempt, DeliveryState, JobCaller, Webhook
from splitserve.jobs.store import JobStore
from splitserve.telemetry.traces import TraceContext, Tracing, received_in
from splitserve.watched import Watched
from splitserve.wire.http1.retry_after import parse_retry_after

ATTEMPT_TIMEOUT_S = 15.0
LEASE_S = 30.0
BACKOFF = Backoff(5.0, 3600.0, jitter=(0.75, 1.25))
GIVE_UP_S = 86_400.0
MAX_PER_HOST, MAX_AT_ONCE = 4, 64
MAX_ANSWER_BYTES = 1024
POLL_S = 1.0
MAX_URL_LENGTH = 2048

EVERYONE = "*"
"""In the file of secrets: of callers that have none of their own."""

Secrets = Mapping[str, Sequence[bytes]]


def read_secrets(path: str) -> Secrets:
    """The secrets of callers: a JSON object of lists of ``whsec_…``, by caller's name.

    Where callers are not authenticated, the name is "".

    Raises:
        OSError: the file cannot be read.
        ValueError: it is malformed.
    """
    try:
        content = msgspec.json.decode(Path(path).read_bytes(), type=dict[str, list[str]])
    except msgspec.DecodeError:
        raise ValueError(f'{path}: expected a JSON object of lists of secrets, {{"CALLER": ["whsec_BASE64"]}}') from None
    found = {}
    for name, secrets in content.items():
        try:
            found[name] = [decode_secret(secret) for secret in secrets]
        except binascii.Error:
            raise ValueError(f'{path}: secrets of "{name}": expected "whsec_" and base64 of 24 bytes or more') from None
    return found


def decode_secret(text: str) -> bytes:
    """The bytes of a secret. Raises `binascii.Error`."""
    if not text.startswith("whsec_"):
        raise binascii.Error("expected whsec_")
    secret = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    if len(secret) < 24:
        raise binascii.Error("expected 24 bytes or more")
    return secret


def signature(secrets: Iterable[bytes], delivery_id: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``: one for each secret, separated by spaces."""
    signed = f"{delivery_id}.{timestamp}.".encode() + body
    digests = (hmac.new(secret, signed, hashlib.sha256).digest() for secret in secrets)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


class WebhookPolicy:
    """What is allowed, and with which secrets it is signed.

    Args:
        hosts: shell patterns of host names; none: webhooks are refused.
        secrets_file: see `read_secrets`; read again when it changes.

    Raises:
        OSError, ValueError: the file cannot be used.
    """

    def __init__(self, hosts: Sequence[str], secrets_file: str) -> None:
        self._hosts = [host.lower() for host in hosts]
        self._secrets = Watched([secrets_file], lambda: read_secrets(secrets_file)) if secrets_file else None

    def secrets(self, caller: str) -> Sequence[bytes]:
        """Those of a caller, the newest of which may not be known to the receiver yet."""
        if self._secrets is None:
            return ()
        self._secrets.has_changed()
        found = self._secrets.value
        return found.get(caller) or found.get(EVERYONE) or ()

    def check(self, caller: JobCaller, webhook: Webhook) -> None:
        """Raises:
        InvalidInput: it is not allowed; the message says why.
        """
        if not self._hosts:
            raise InvalidInput("webhooks are disabled: no hosts are allowed (JOBS_WEBHOOK_HOSTS)")
        try:
            url = urlsplit(webhook.url)
            port = url.port
        except ValueError:
            raise InvalidInput("webhook: the URL is malformed") from None
        if url.scheme != "https" or not url.hostname or len(webhook.url) > MAX_URL_LENGTH or port == 0:
            raise InvalidInput(f"webhook: expected an https URL of up to {MAX_URL_LENGTH} characters")
        if url.username is not None or url.password is not None or not webhook.url.isascii() or not webhook.url.isprintable():
            raise InvalidInput("webhook: the URL has credentials, or characters that are not allowed")
        if not self.is_allowed(url.hostname):
            raise InvalidInput(f'webhook: the host "{url.hostname[:64]}" is not allowed (JOBS_WEBHOOK_HOSTS)')
        if not self.secrets(caller.name):
            raise InvalidInput("webhook: there is no secret to sign it with (JOBS_WEBHOOK_SECRETS_FILE)")

    def is_allowed(self, host: str) -> bool:
        """Whether one of the patterns matches."""
        return any(fnmatchcase(host.lower(), pattern) for pattern in self._hosts)


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked. TLS is with the name, by httpcore.

    Args:
        resolve: all addresses of a name.
        check: which of them may be connected to.
    """

    def __init__(
        self,
        resolve: Callable[[str, int], Awaitable[Sequence[str]]] = addresses.resolve,
        check: Callable[[str, Sequence[str]], Sequence[str]] = addresses.check_all,
    ) -> None:
        self._resolve = resolve
        self._check = check
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address of the name that answers."""
        error: Exception | None = None
        for address in self._check(host, await self._resolve(host, port)):
            try:
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError as failure:
                error = failure
        raise error or AddressRefused(f"{host} has no address")

    async def sleep(self, seconds: float) -> None:
        """As asyncio's."""
        await asyncio.sleep(seconds)


class OpenedStreams(httpcore.AsyncNetworkBackend):
    """Connects by another backend, and closes the connections of one attempt whatever ends it.

    httpcore closes no connection whose TLS handshake is cancelled.
    """

    def __init__(self, backend: httpcore.AsyncNetworkBackend) -> None:
        self._backend = backend
        self._streams: list[httpcore.AsyncNetworkStream] = []

    async def connect_tcp(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        """Connect as the other backend does."""
        stream = await self._backend.connect_tcp(*args, **options)
        self._streams.append(stream)
        return stream

    async def sleep(self, seconds: float) -> None:
        """As the other backend's."""
        await self._backend.sleep(seconds)

    async def __aenter__(self) -> OpenedStreams:
        return self

    async def __aexit__(self, *error: object) -> None:
        for stream in self._streams:
            with contextlib.suppress(OSError):
                await stream.aclose()


class WebhookSender:
    """Sends what is in the outbox until `run` is cancelled.

    Args:
        store: where the outbox is.
        policy: secrets, and hosts, which may have been taken off the list since the submit.
        backend: connects.
        context: of TLS; the well-known authorities by default.
        clock: seconds since the epoch, for signatures and for giving up.
    """

    def __init__(
        self,
        store: JobStore,
        policy: WebhookPolicy,
        *,
        backend: httpcore.AsyncNetworkBackend | None = None,
        context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._policy = policy
        self._backend = backend or PinnedBackend()
        self._context = context
        self._clock = clock
        self._log = structlog.get_logger()
        self._work = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], str] = {}

    def wake(self) -> None:
        """There may be something to send."""
        self._work.set()

    async def run(self) -> None:
        """Send until cancelled."""
        try:
            while True:
                self._work.clear()
                if not await self._begin_one():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(POLL_S):
                            await self._work.wait()
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin_one(self) -> bool:
        """Begin an attempt; False if there is none to begin."""
        hosts = list(self._tasks.values())
        if len(hosts) >= MAX_AT_ONCE:
            return False
        busy = [host for host in set(hosts) if hosts.count(host) >= MAX_PER_HOST]
        try:
            delivery = await self._store.claim_delivery(LEASE_S, busy)
        except SplitserveError:
            return False
        if delivery is None:
            return False
        task = asyncio.create_task(self._attempt(delivery))
        self._tasks[task] = host_of(delivery.url)
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._work.set()

    async def _attempt(self, delivery: Delivery) -> None:
        try:
            async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                status, headers, answer = await self._post(delivery)
            pause = next((value for name, value in headers if name.lower() == b"retry-after"), b"").decode("latin-1")
            retry_after_s = parse_retry_after(pause.strip(), self._clock())
        except (AddressRefused, OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            status, retry_after_s, answer = 0, None, _why(error)
        except Exception as error:
            # An attempt to deliver failed in a way that nobody foresaw. It counts as any other that failed.
            self._log.exception("webhook failed", delivery=delivery.id)
            status, retry_after_s, answer = 0, None, _why(error)
        attempt = self._outcome(delivery, status, retry_after_s, answer)
        if attempt.state.status == "failed":
            # A webhook is given up: its receiver has said 410, or a day has passed.
            self._log.warning("webhook given up", delivery=delivery.id, http_status=status, attempts=delivery.attempt)
        with contextlib.suppress(SplitserveError):  # its lease ends, and it is sent again under the same id
            await self._store.finish_delivery(attempt)

    async def _post(self, delivery: Delivery) -> tuple[int, list[tuple[bytes, bytes]], str]:
        """As `_send`, with a span if the job belongs to a trace that is recorded."""
        content = msgspec.json.decode(delivery.body)
        trace = received_in(content) if isinstance(content, dict) else None
        if trace is not None and (tracer := Tracing.tracer) is not None:
            attributes = {"http.request.method": "POST", "server.address": host_of(delivery.url), "splitserve.job": delivery.job}
            call = tracer.continued(trace, "client", "POST", attributes)
            if call is not None and (span := call.span) is not None:
                with tracer.ending(call):
                    answer = await self._send(delivery, call)
                    span.attributes["http.response.status_code"] = answer[0]
                    return answer
        return await self._send(delivery, trace)

    async def _send(self, delivery: Delivery, trace: TraceContext | None) -> tuple[int, list[tuple[bytes, bytes]], str]:
        """Status, headers and the beginning of the answer."""
        secrets, host = self._policy.secrets(delivery.owner), host_of(delivery.url)
        if not secrets or not self._policy.is_allowed(host):
            raise AddressRefused(f"{host} is not allowed any more, or there is no secret")
        timestamp = int(self._clock())
        headers = [
            ("host", urlsplit(delivery.url).netloc),
            ("content-type", "application/json"),
            ("content-length", str(len(delivery.body))),
            ("user-agent", "splitserve"),
            ("webhook-id", delivery.id),
            ("webhook-timestamp", str(timestamp)),
            ("webhook-signature", signature(secrets, delivery.id, timestamp, delivery.body)),
            *(trace.items() if trace is not None else ()),
        ]
        async with (
            OpenedStreams(self._backend) as backend,
            httpcore.AsyncConnectionPool(ssl_context=self._context, network_backend=backend) as pool,
            pool.stream("POST", delivery.url, headers=headers, content=delivery.body) as response,
        ):
            answer = b""
            if not 200 <= response.status < 300:
                async for part in response.aiter_stream():
                    answer += part
                    if len(answer) >= MAX_ANSWER_BYTES:
                        break
            return response.status, list(response.headers), answer[:MAX_ANSWER_BYTES].decode(errors="replace")

    def _outcome(self, delivery: Delivery, status: int, retry_after_s: float | None, answer: str) -> DeliveryAttempt:
        def attempt(state: str, retry_s: float | None = None) -> DeliveryAttempt:
            return DeliveryAttempt(delivery.id, DeliveryState(state, delivery.attempt, status, answer), retry_s)

        if 200 <= status < 300:
            return attempt("delivered")
        delay_s = BACKOFF.pause_s(delivery.attempt)
        if retry_after_s is not None:
            delay_s = min(BACKOFF.most_s, max(1.0, retry_after_s))
        if status == 410 or self._clock() + delay_s - delivery.created > GIVE_UP_S:
            return attempt("failed")
        return attempt("pending", delay_s)


def _why(error: Exception) -> str:
    """What the caller learns of an attempt without an answer: nothing of what is in the network."""
    if isinstance(error, AddressRefused):
        return str(error)
    if isinstance(error, TimeoutError | httpcore.TimeoutException):
        return "no answer in time"
    return "the receiver cannot be reached"
