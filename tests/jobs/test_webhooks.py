"""Webhooks: which are allowed, how they are signed, where they are sent, and how often. Source: Standard Webhooks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trustme
from standardwebhooks.webhooks import Webhook as StandardWebhook

from splitserve.errors import InvalidInput
from splitserve.jobs import webhooks
from splitserve.jobs.addresses import AddressRefused, check_all, is_public, resolve
from splitserve.jobs.records import Delivery, Finish, Job, JobCaller, NewJob, Payload, Webhook, new_id
from splitserve.jobs.sqlite import SqliteStore
from splitserve.jobs.webhooks import PinnedBackend, WebhookPolicy, WebhookSender, decode_secret, read_secrets
from tests.telemetry import traced

SECRETS = [f"whsec_{base64.b64encode(bytes([number]) * 32).decode()}" for number in (1, 2)]
CALLER = JobCaller("ann", ("*",))


# Addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # metadata of cloud machines
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::7f00:1", False),
        ("::ffff:0:7f00:1", False),
        ("::7f00:1", False),
        ("fec0::1", False),
        ("5f00::1", False),
        ("100::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("2606:4700::1111", True),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),
    ],
)
def test_only_addresses_of_the_internet_are_public(text: str, expected: bool) -> None:
    """In whatever form IPv6 hides an IPv4 address."""
    assert is_public(ipaddress.ip_address(text)) is expected


@pytest.mark.parametrize(
    "found", [[], ["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["93.184.216.34", "::1"], ["fe80::1%eth0"], ["nonsense"]]
)
def test_every_address_of_a_name_has_to_be_public(found: list[str]) -> None:
    """Not only the first one."""
    with pytest.raises(AddressRefused):
        check_all("example.org", found)


async def test_a_connection_goes_to_an_address_that_was_checked() -> None:
    """The name is resolved once: what it resolves to afterwards makes no difference."""
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    connected = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        return next(answers)

    class Recording:
        async def connect_tcp(self, host: str, *_: Any) -> str:
            connected.append(host)
            return "stream"

    backend = PinnedBackend(resolve)
    backend._backend = Recording()

    assert await backend.connect_tcp("example.org", 443) == "stream"
    with pytest.raises(AddressRefused):
        await backend.connect_tcp("example.org", 443)
    assert connected == ["93.184.216.34"]


# Policy


@pytest.fixture
def secrets_file(tmp_path: Path) -> Path:
    file = tmp_path / "secrets.json"
    file.write_text(json.dumps({"ann": SECRETS}))
    return file


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://hooks.example.org/x", ""),
        ("https://hooks.EXAMPLE.org:8443/x?y=1", ""),
        ("http://hooks.example.org/x", "https"),
        ("https://other.org/", "not allowed"),
        ("https://hooks.example.org.evil.org/", "not allowed"),
        ("https://user:pass@hooks.example.org/", "credentials"),
        ("https://hooks.example.org@evil.org/", "credentials"),
        ("https://127.0.0.1/", "not allowed"),
        ("https://2130706433/", "not allowed"),
        ("https://0x7f000001/", "not allowed"),
        ("https://hooks.example.org/\r\nx: y", "allowed"),
        ("https://hooks.example.org:99999/", "malformed"),
        ("https://[::1/", "malformed"),
        ("https:///x", "https"),
        ("https://hooks.example.org/" + "x" * 2048, "2048"),
        ("", "https"),
    ],
)
def test_webhooks_go_to_https_urls_of_allowed_hosts(secrets_file: Path, url: str, why: str) -> None:
    """Anything else is refused when the job is submitted."""
    policy = WebhookPolicy(["*.example.org"], str(secrets_file))

    with pytest.raises(InvalidInput, match=why) if why else contextlib.nullcontext():
        policy.check(CALLER, Webhook(url))


def test_webhooks_need_a_list_of_hosts_and_a_secret(secrets_file: Path) -> None:
    """Both are empty by default; the message names the setting."""
    with pytest.raises(InvalidInput, match="JOBS_WEBHOOK_HOSTS"):
        WebhookPolicy([], str(secrets_file)).check(CALLER, Webhook("https://example.org/"))
    with pytest.raises(InvalidInput, match="JOBS_WEBHOOK_SECRETS_FILE"):
        WebhookPolicy(["*"], "").check(CALLER, Webhook("https://example.org/"))
    with pytest.raises(InvalidInput, match="no secret"):
        WebhookPolicy(["*"], str(secrets_file)).check(JobCaller("bob", ()), Webhook("https://example.org/"))


def test_secrets_are_those_of_the_caller_or_of_everyone(tmp_path: Path) -> None:
    """And are read again when the file changes."""
    file = tmp_path / "secrets.json"
    file.write_text(json.dumps({"ann": SECRETS[:1]}))
    policy = WebhookPolicy(["*"], str(file))
    before = policy.secrets("ann"), policy.secrets("bob")

    file.write_text(json.dumps({"ann": SECRETS, "*": SECRETS[1:]}))

    assert before == ([bytes([1]) * 32], ())
    assert policy.secrets("ann") == [bytes([1]) * 32, bytes([2]) * 32]
    assert policy.secrets("bob") == [bytes([2]) * 32]


@pytest.mark.parametrize("content", ["", "[]", '{"ann": "whsec_x"}', '{"ann": ["no prefix"]}', '{"ann": ["whsec_c2hvcnQ="]}'])
def test_malformed_secrets_are_refused(tmp_path: Path, content: str) -> None:
    """At the start, naming the file; a raw secret is not taken for an encoded one."""
    file = tmp_path / "secrets.json"
    file.write_text(content)

    with pytest.raises(ValueError, match=r"secrets\.json.*expected .*whsec_"):
        read_secrets(str(file))


@pytest.mark.parametrize("body", [b'{"a": NaN}', '{"name": "\N{SNOWMAN}"}'.encode(), b"{}", b'{"data":  {"x":1}}'])
def test_signatures_are_verified_by_the_standard_library_of_webhooks(body: bytes) -> None:
    """With each of two secrets, over the bytes that are sent."""
    timestamp = int(time.time())
    signed = webhooks.signature(map(decode_secret, SECRETS), "msg_1", timestamp, body)
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(timestamp), "webhook-signature": signed}

    assert signed.count("v1,") == 2
    for secret in SECRETS:
        StandardWebhook(secret).verify(body, headers)


# Sending


class Receiver:
    """An https server on loopback that answers as it is told, and keeps what it was sent."""

    def __init__(self, authority: trustme.CA, name: str) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(self.context)
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[bytes] = []
        """Of the next requests; then 204."""
        self.is_endless = False
        self.silent = 0
        """How many of the next requests are not answered."""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.requests.append((headers, body))
            if self.silent:
                self.silent -= 1
                await reader.read()  # until the sender gives up
            elif self.is_endless:
                writer.write(b"HTTP/1.1 500 Oops\r\ntransfer-encoding: chunked\r\n\r\n")
                while not writer.is_closing():
                    writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
                    await writer.drain()
            else:
                writer.write(self.answers.pop(0) if self.answers else b"HTTP/1.1 204 No Content\r\n\r\n")
                await writer.drain()
        writer.close()


def answer(status: int, *headers: str, body: str = "") -> bytes:
    lines = (f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers)
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


class Post:
    """A store, a sender and receivers."""

    def __init__(self, store: SqliteStore, sender: WebhookSender, ports: dict[str, int], receivers: dict[str, Receiver]) -> None:
        self.store = store
        self.sender = sender
        self.ports = ports
        self.receivers = receivers

    async def end_a_job(self, host: str = "one.example.org", trace: dict[str, str] | None = None) -> Job:
        webhook = Webhook(f"https://{host}:{self.ports[host]}/hook?x=1", trace=trace or {})
        new = NewJob(id=new_id(), owner="ann", model="m", version="1.1", request=Payload(b"r"), webhook=webhook)
        await self.store.submit(new)
        (claimed,) = await self.store.claim("w", 1, 3600)
        await self.store.finish([Finish(claimed.lease, Payload(b"answer"))])
        self.sender.wake()
        return await self.store.get("ann", new.id)

    async def until(self, job: Job, is_it: Callable[[Job], bool]) -> Job:
        async with asyncio.timeout(30):
            while True:
                now = await self.store.get("ann", job.id)
                if is_it(now):
                    return now
                await asyncio.sleep(0.01)


HOSTS = ("one.example.org", "two.example.org")


@pytest.fixture
async def post(tmp_path: Path, secrets_file: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Post]:
    monkeypatch.setattr(webhooks, "BACKOFF", webhooks.BACKOFF._replace(first_s=0.0))
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without the certificates of the system, which take longest to read
    authority.configure_trust(context)

    async def resolve(host: str, port: int) -> Sequence[str]:
        if host not in HOSTS:
            raise OSError("no such host")
        return ["127.0.0.1"]

    store = SqliteStore(tmp_path / "jobs")
    store.open()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        receivers = {host: Receiver(authority, host) for host in HOSTS}
        ports = {}
        for host, receiver in receivers.items():
            server = await asyncio.start_server(receiver.handle, "127.0.0.1", 0, ssl=receiver.context)
            stack.callback(server.close)
            ports[host] = server.sockets[0].getsockname()[1]
        policy = WebhookPolicy(["*.example.org"], str(secrets_file))
        backend = PinnedBackend(resolve, lambda _, found: found)
        sender = WebhookSender(store, policy, backend=backend, context=context)
        task = asyncio.create_task(sender.run())
        yield Post(store, sender, ports, receivers)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_attempt_that_is_cancelled_in_the_handshake_closes_its_connection(post):
    """As when the service stops."""
    accepted: asyncio.Queue[asyncio.StreamReader] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)  # the handshake has begun, and nothing answers it
        await accepted.put(reader)
        await reader.read()
        await accepted.put(reader)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        post.ports["one.example.org"] = server.sockets[0].getsockname()[1]
        await post.end_a_job()
        await asyncio.wait_for(accepted.get(), 30)
        (attempt,) = post.sender._tasks
        attempt.cancel()
        await asyncio.wait([attempt])
        await asyncio.wait_for(accepted.get(), 30)


async def test_a_webhook_has_the_trace_of_its_job(post):
    """In headers, and in its body; the span of the delivery, where it is recorded, is between."""
    trace = {"traceparent": traced.SAMPLED, "tracestate": "a=1", "baggage": "k=v"}
    first = await post.end_a_job(trace=trace)
    await post.until(first, lambda now: now.delivery.status == "delivered")
    with traced.tracing() as recorded:
        second = await post.end_a_job(trace=trace)
        await post.until(second, lambda now: now.delivery.status == "delivered")

    (headers, body), (headers_2, _) = post.receivers["one.example.org"].requests
    (span,) = recorded.spans
    assert {name: headers[name] for name in trace} == trace == {name: json.loads(body)[name] for name in trace}
    assert "trace" not in json.loads(body)["data"]["webhook"]
    assert headers_2["traceparent"] == f"00-{traced.TRACE}-{span.span_id}-01"
    assert (span.kind, span.parent_id, span.attributes["http.response.status_code"]) == ("client", traced.CALLER, 204)


async def test_a_webhook_is_signed_and_sent_to_the_name(post):
    """The certificate is that of the name, though the connection is to an address; both secrets verify the bytes."""
    job = await post.end_a_job()

    seen = await post.until(job, lambda now: now.delivery.status == "delivered")

    ((headers, body),) = post.receivers["one.example.org"].requests
    content = json.loads(body)
    assert headers["host"] == f"one.example.org:{post.ports['one.example.org']}"
    assert headers["webhook-id"] == f"msg_{job.id}_succeeded"
    for secret in SECRETS:
        StandardWebhook(secret).verify(body, headers)
    assert (content["type"], content["data"]["id"], content["data"]["status"]) == ("job.succeeded", job.id, "succeeded")
    assert (seen.delivery.http_status, seen.delivery.attempt) == (204, 1)


async def test_a_certificate_of_another_name_is_refused(post):
    """The address alone proves nothing."""
    one, two = post.receivers.values()
    post.ports["one.example.org"] = post.ports["two.example.org"]
    job = await post.end_a_job()

    seen = await post.until(job, lambda now: now.delivery.attempt >= 1)

    assert seen.delivery.status == "pending"
    assert one.requests == two.requests == []


@pytest.mark.parametrize(
    "first",
    [answer(500, body="oops"), answer(302, "location: https://two.example.org/"), answer(404), answer(429), b"junk\r\n\r\n"],
)
async def test_anything_but_success_is_tried_again(post, first):
    """Redirects too, which are not followed; with the same id and the same bytes."""
    receiver = post.receivers["one.example.org"]
    receiver.answers.append(first)
    job = await post.end_a_job()

    await post.until(job, lambda now: now.delivery.status == "delivered")

    (headers, body), (headers_2, body_2) = receiver.requests
    assert (headers["webhook-id"], body) == (headers_2["webhook-id"], body_2)
    assert post.receivers["two.example.org"].requests == []


@pytest.mark.parametrize("value", ["7", "Fri, 31 Dec 2199 23:59:59 GMT"])
async def test_the_receiver_may_ask_for_a_pause(post, monkeypatch, value):
    """By a number of seconds or a date; then it is tried again, and not before."""
    pauses, finish = [], post.store.finish_delivery

    async def recorded(attempt):
        pauses.append(attempt.retry_s)
        await finish(attempt)

    monkeypatch.setattr(post.store, "finish_delivery", recorded)
    post.receivers["one.example.org"].answers.append(answer(503, f"retry-after: {value}"))
    job = await post.end_a_job()

    await post.until(job, lambda now: now.delivery.attempt == 1)

    assert pauses == [7.0 if value == "7" else webhooks.BACKOFF.most_s]


async def test_gone_ends_the_delivery(post):
    """The receiver does not want it any more; the answer is kept."""
    post.receivers["one.example.org"].answers.append(answer(410, body="no more"))
    job = await post.end_a_job()

    seen = await post.until(job, lambda now: now.delivery.status == "failed")

    assert (seen.status, seen.delivery.http_status, seen.delivery.answer) == ("succeeded", 410, "no more")
    assert len(post.receivers["one.example.org"].requests) == 1


@pytest.mark.parametrize(
    ("status", "retry_after", "attempt", "age_s", "state", "least_s", "most_s"),
    [
        (200, None, 1, 0, "delivered", None, None),
        (299, None, 1, 0, "delivered", None, None),
        (301, None, 1, 0, "pending", 3.75, 6.25),
        (500, None, 3, 0, "pending", 15, 25),
        (500, None, 99, 0, "pending", 2700, 4500),
        (500, None, 10_000, 0, "pending", 2700, 4500),
        (0, None, 1, 0, "pending", 3.75, 6.25),
        (410, None, 1, 0, "failed", None, None),
        (429, 120.0, 1, 0, "pending", 120, 120),
        (429, 0.0, 1, 0, "pending", 1, 1),
        (503, 1e8, 1, 0, "pending", 3600, 3600),
        (500, None, 30, 86_399, "failed", None, None),
    ],
)
def test_what_follows_from_an_answer(tmp_path, secrets_file, status, retry_after, attempt, age_s, state, least_s, most_s):
    """Backoff up to an hour, Retry-After within limits, and an end after a day."""
    sender = WebhookSender(None, WebhookPolicy([], str(secrets_file)), backend=PinnedBackend(), clock=lambda: 1e9)
    delivery = Delivery(id="msg", job="j", owner="ann", url="https://x/", body=b"", attempt=attempt, created=1e9 - age_s)

    outcome = sender._outcome(delivery, status, retry_after, "")

    assert outcome.state.status == state
    if least_s is None:
        assert outcome.retry_s is None
    else:
        assert least_s <= outcome.retry_s <= most_s


async def test_an_answer_without_end_is_cut(post):
    """A kilobyte of it is kept."""
    receiver = post.receivers["one.example.org"]
    receiver.is_endless = True
    job = await post.end_a_job()

    seen = await post.until(job, lambda now: now.delivery.attempt >= 1)
    receiver.is_endless = False

    assert seen.delivery.answer == "x" * 1024


async def test_a_slow_receiver_holds_up_only_its_own(post):
    """Its deliveries in flight are few; others are sent meanwhile, and nothing twice."""
    slow = post.receivers["one.example.org"]
    slow.silent = 1000
    for _ in range(10):
        await post.end_a_job("one.example.org")

    quick = [await post.end_a_job("two.example.org") for _ in range(10)]
    for job in quick:
        await post.until(job, lambda now: now.delivery.status == "delivered")

    assert len(slow.requests) <= webhooks.MAX_PER_HOST
    assert len(post.receivers["two.example.org"].requests) == 10


async def test_a_receiver_that_is_away_does_not_touch_the_job(post, monkeypatch):
    """The job has succeeded; what the caller learns of the network is only that there was no answer."""
    monkeypatch.setattr(webhooks, "BACKOFF", webhooks.BACKOFF._replace(first_s=3600.0))
    post.ports["one.example.org"] = 1
    job = await post.end_a_job()

    seen = await post.until(job, lambda now: now.delivery.attempt == 1 and now.delivery.answer)

    assert (seen.status, seen.delivery.status) == ("succeeded", "pending")
    assert seen.delivery.answer == "the receiver cannot be reached"


async def test_an_attempt_that_fails_unexpectedly_is_one_that_failed(post, monkeypatch):
    """It is counted and tried again, until the day is over."""
    send, errors = post.sender._post, [ValueError("nobody foresaw this")]

    async def failing_first(delivery):
        if errors:
            raise errors.pop()
        return await send(delivery)

    monkeypatch.setattr(post.sender, "_post", failing_first)
    job = await post.end_a_job()

    seen = await post.until(job, lambda now: now.delivery.status == "delivered")

    assert seen.delivery.attempt == 2


async def test_a_name_that_cannot_be_resolved_is_a_failed_attempt(post, monkeypatch):
    """It is tried again; nothing is sent to it unchecked."""
    monkeypatch.setattr(webhooks, "BACKOFF", webhooks.BACKOFF._replace(first_s=3600.0))
    post.ports["three.example.org"] = 443
    job = await post.end_a_job("three.example.org")

    seen = await post.until(job, lambda now: now.delivery.attempt == 1 and now.delivery.answer)

    assert (seen.delivery.status, seen.delivery.answer) == ("pending", "the receiver cannot be reached")


async def test_what_can_be_no_name_is_not_resolved():
    """Python refuses it with an error of another kind than for names that do not exist."""
    with pytest.raises(OSError, match="no name of a host"):
        await resolve("a" * 64 + ".example.org", 443)


async def test_a_host_that_was_taken_off_the_list_is_not_called(post):
    """The list of now counts, not that of the submit."""
    post.sender._policy._hosts = []
    job = await post.end_a_job()

    await post.until(job, lambda now: now.delivery.attempt >= 1)

    assert post.receivers["one.example.org"].requests == []
