"""``splitserve top``: what a running system does, from the admin listeners of its services."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import ssl
import sys
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec

from splitserve.cli.serve import ADMIN_OFFSETS
from splitserve.telemetry.reading import Interval, NotMetrics, Scrape
from splitserve.telemetry.views import ListenerView, View, view_of

if TYPE_CHECKING:
    from rich.console import RenderableType

BASE_PORT = 8002
"""Of the proxy's admin listener."""

TIMEOUT_S = 2.0
"""For the answer of a listener."""

CONNECTION_REFUSED = "connection refused"
WIDTH_OF_A_PIPE = 160
_MIB = 1024 * 1024


class Credentials(NamedTuple):
    """Files to talk to admin listeners with; "": none."""

    token_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


class CannotStart(Exception):
    """An option cannot be used; the message says which."""


def targets(urls: Sequence[str], admin_port: str, *, is_tls: bool, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The URLs of the admin listeners: those that are named, else those of this machine.

    Args:
        urls: each ``http://host:port``, ``https://host:port``, ``host:port`` or a port.
        admin_port: as for ``splitserve up``; "": the services' settings, else the default ports.
        is_tls: those without a scheme are https.
        environment: has the services' settings, if they were set for them here.

    Raises:
        CannotStart: a URL is none, or there is no listener to ask.
    """
    scheme = "https" if is_tls else "http"
    if urls:
        return [_url(url, scheme) for url in urls]
    if admin_port and not (admin_port.isdecimal() and 0 < int(admin_port) <= 65535 - max(ADMIN_OFFSETS.values())):
        raise CannotStart(f'--admin-port: expected the port that "splitserve up --admin-port" was given, got "{admin_port}"')
    found = []
    for service, offset in ADMIN_OFFSETS.items():
        port = str(int(admin_port or BASE_PORT) + offset)
        if not admin_port:
            port = environment.get(f"{service.upper()}_ADMIN_PORT") or port
        if port not in ("0", "off"):
            found.append(_url(f"127.0.0.1:{port}", scheme))
    if not found:
        raise CannotStart("the settings turn off all admin listeners, or have them on any free port: --url names one")
    return found


def _url(text: str, scheme: str) -> str:
    url = text if "://" in text else f"{scheme}://{f'127.0.0.1:{text}' if text.isdecimal() else text}"
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and bool(parts.port)
    except ValueError:
        is_valid = False
    if not is_valid or parts.path not in ("", "/", "/metrics") or parts.query:
        raise CannotStart(f'--url: expected the address of an admin listener as http://host:port, got "{text}"')
    return f"{parts.scheme}://{parts.netloc}"


class NobodyAnswers(Exception):
    """There is nothing to show: none of these listeners answers."""

    def __init__(self, listeners: Sequence[ListenerView]) -> None:
        super().__init__(listeners)
        self.listeners = listeners


class Watcher:
    """Asks admin listeners, and remembers their last scrapes. An async context manager.

    Args:
        urls: of the listeners.
        credentials: for all of them.
        timeout_s: for the answer of each.
        is_named: the user has named them. Otherwise one whose connection is refused is left out until it has answered once.

    Raises:
        CannotStart: a file cannot be used.
    """

    def __init__(
        self, urls: Sequence[str], credentials: Credentials, *, timeout_s: float = TIMEOUT_S, is_named: bool = True
    ) -> None:
        self._timeout_s = timeout_s
        self._urls = urls
        self._known = set(urls) if is_named else set()
        self._has_answered = False
        self._scrapes: dict[str, Scrape] = {}
        # Addresses are internal: no proxy of the environment is asked for them.
        self._client = httpx.AsyncClient(
            verify=_ssl_context(credentials), headers=_headers(credentials), timeout=timeout_s, trust_env=False
        )

    async def __aenter__(self) -> Watcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def look(self) -> View:
        """Ask all of them now.

        Raises:
            NobodyAnswers: none of them has ever answered.
        """
        found = await asyncio.gather(*map(self._ask, self._urls))
        self._known |= {listener.url for listener, interval in found if interval is not None}
        if not any(interval is not None for _, interval in found) and not self._has_answered:
            raise NobodyAnswers([listener for listener, _ in found])
        self._has_answered = True
        return view_of(
            time.time(), [each for each in found if each[0].url in self._known or each[0].problem != CONNECTION_REFUSED]
        )

    async def _ask(self, url: str) -> tuple[ListenerView, Interval | None]:
        before = self._scrapes.get(url)
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                ready, metrics = await self._get(url, "/readyz"), await self._get(url, "/metrics")
            if metrics.status_code != httpx.codes.OK:
                return ListenerView(url, _refusal(metrics.status_code)), None
            scrape = Scrape(metrics.text, time.monotonic())
        except (httpx.HTTPError, TimeoutError) as error:
            return ListenerView(url, _no_answer(url, error, self._timeout_s)), None
        except NotMetrics as error:
            return ListenerView(url, f"no metrics of splitserve: {error}"), None
        if not scrape.is_ours:
            return ListenerView(url, "no metrics of splitserve: another program listens there"), None
        self._scrapes[url] = scrape
        return ListenerView(url, not_ready_reason=_reason(ready)), Interval(before, scrape)

    async def _get(self, url: str, path: str) -> httpx.Response:
        return await self._client.get(f"{url}{path}", headers={"accept": "text/plain" if path == "/metrics" else "*/*"})


def _ssl_context(credentials: Credentials) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=credentials.ca_file or None)
        if credentials.cert_file:
            context.load_cert_chain(credentials.cert_file, credentials.key_file or None)
    except OSError as error:  # as an SSLError is
        raise CannotStart(f"--ca-file, --cert-file, --key-file: {error}") from None
    return context


def _headers(credentials: Credentials) -> dict[str, str]:
    if not credentials.token_file:
        return {}
    try:
        token = Path(credentials.token_file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"--token-file: {error}") from None
    if not token.isprintable() or not token:
        raise CannotStart(f"--token-file: {credentials.token_file}: expected one token")
    return {"authorization": f"Bearer {token}"}


def _refusal(status: int) -> str:
    if status == httpx.codes.UNAUTHORIZED:
        return "401: it expects its token: --token-file names the file of ..._ADMIN_TOKEN_FILE"
    if status == httpx.codes.MISDIRECTED_REQUEST:
        return "421: it is not served under this name: use its address, or add the name to ..._ADMIN_ALLOWED_HOSTS"
    return f"{status} to /metrics: not an admin listener"


def _no_answer(url: str, error: Exception, timeout_s: float) -> str:
    """Why there was none, and what may help."""
    text = str(error)
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return f"no answer within {timeout_s:g} s"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"its certificate is not trusted: --ca-file names that of its authority ({text})"
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
        return "it does not speak TLS: use http://"
    if isinstance(error, httpx.ConnectError):
        return CONNECTION_REFUSED if "Connection refused" in text or "All connection attempts" in text else text
    if url.startswith("http:"):
        return f"no HTTP answer ({text or type(error).__name__}): if it has TLS, use https:// and --ca-file"
    return f"no HTTP answer ({text or type(error).__name__}): it may require a client's certificate: --cert-file, --key-file"


def _reason(response: httpx.Response) -> str:
    with contextlib.suppress(msgspec.DecodeError):
        return str(msgspec.json.decode(response.content, type=dict[str, Any]).get("reason", ""))
    return ""


def run(
    urls: Sequence[str],
    *,
    admin_port: str,
    interval_s: float,
    timeout_s: float,
    is_once: bool,
    is_json: bool,
    credentials: Credentials,
) -> int:
    """Show it until the user leaves, or once; the exit status: 1 no listener answers, 2 an option cannot be used."""
    try:
        where = targets(urls, admin_port, is_tls=bool(credentials.ca_file))
        watcher = Watcher(where, credentials, timeout_s=timeout_s, is_named=bool(urls))
    except CannotStart as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return asyncio.run(_run(watcher, interval_s, is_once, is_json))
    except NobodyAnswers as error:
        print(_nobody(error.listeners, is_named=bool(urls)), file=sys.stderr)
        return 1
    except BrokenPipeError:  # who read it has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


async def _run(watcher: Watcher, interval_s: float, is_once: bool, is_json: bool) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError, AttributeError):  # as on Windows
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            loop.add_signal_handler(number, stop.set)
    async with watcher:
        view = await _unless(stop, watcher.look())
        if view is None:
            return 0
        is_terminal = sys.stdout.isatty() and not is_json and not is_once and os.environ.get("TERM") != "dumb"
        if is_terminal:
            await _live(watcher, view, stop, interval_s)
        else:
            await _lines(watcher, stop, interval_s, is_once=is_once, is_json=is_json)
    return 0


def _nobody(listeners: Sequence[ListenerView], *, is_named: bool) -> str:
    lines = ["no admin listener answers:", *(f"  {each.url}: {each.problem}" for each in listeners)]
    if not is_named:
        lines.append(
            'Services of this machine have one there unless ..._ADMIN_PORT is set; their log line "listening" names the port. '
            '--url names a listener, --admin-port BASE those of "splitserve up --admin-port BASE".'
        )
    return "\n".join(lines)


async def _lines(watcher: Watcher, stop: asyncio.Event, interval_s: float, *, is_once: bool, is_json: bool) -> None:
    """Print each view from the second on: the first one has no rates."""
    while not await _is_set(stop, interval_s):
        view = await _unless(stop, watcher.look())
        if view is None:
            return
        print(msgspec.json.encode(view).decode() if is_json else _text(view), flush=True)
        if is_once:
            return


async def _live(watcher: Watcher, view: View, stop: asyncio.Event, interval_s: float) -> None:
    """Show the view of now on the whole terminal, until q or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False, emoji=False, highlight=False)
    loop = asyncio.get_running_loop()
    shown = view
    with _keys(stop), Live(console=console, screen=True, auto_refresh=False) as live:

        def draw() -> None:
            live.update(rendered(shown, console.width, console.height, hint="q: quit"), refresh=True)

        with contextlib.suppress(NotImplementedError, AttributeError):
            loop.add_signal_handler(signal.SIGWINCH, draw)
            loop.add_signal_handler(signal.SIGTSTP, draw)  # a process that is stopped would keep the screen
        draw()
        while not await _is_set(stop, interval_s):
            seen = await _unless(stop, watcher.look())
            if seen is not None:
                shown = seen
                draw()


@contextlib.contextmanager
def _keys(stop: asyncio.Event) -> Iterator[None]:
    """Have q end it. The terminal is as before afterwards."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    file, loop = sys.stdin.fileno(), asyncio.get_running_loop()

    def read() -> None:
        typed = os.read(file, 64)
        if not typed or set(typed) & set(b"qQ\x03\x04"):
            stop.set()

    before = termios.tcgetattr(file)
    try:
        tty.setcbreak(file)
        loop.add_reader(file, read)
        yield
    finally:
        loop.remove_reader(file)
        termios.tcsetattr(file, termios.TCSADRAIN, before)


async def _is_set(stop: asyncio.Event, timeout_s: float) -> bool:
    """Whether it is, or will be within the time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await stop.wait()
    return stop.is_set()


async def _unless(stop: asyncio.Event, look: Awaitable[View]) -> View | None:
    """What it sees; None: the user leaves meanwhile."""
    looking, stopping = asyncio.ensure_future(look), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((looking, stopping), return_when=asyncio.FIRST_COMPLETED)
        return looking.result() if looking.done() and not stop.is_set() else None
    finally:
        for task in (looking, stopping):
            task.cancel()
        await asyncio.gather(looking, stopping, return_exceptions=True)


def _text(view: View) -> str:
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH_OF_A_PIPE
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:  # a Console ends the process if who reads it leaves
        console.print(rendered(view, console.width))
    return captured.get()


def rendered(view: View, width: int, height: int | None = None, *, hint: str = "") -> RenderableType:
    """A view as tables.

    Args:
        view: what is shown.
        width: columns that there are; what matters least is left out.
        height: lines that there are; the releases with the most requests are shown. None: any number.
        hint: shown in the first line.
    """
    from rich.console import Group
    from rich.text import Text

    clock = time.strftime("%H:%M:%S", time.localtime(view.time))
    head = "   ".join(
        filter(None, (f"splitserve top  {clock}", f"of the last {view.interval_s:.1f} s" * bool(view.interval_s), hint))
    )
    parts: list[RenderableType] = [Text(head, style="bold"), Text("")]
    problems = _problems(view)
    parts += [Text(problem, style="red") for problem in problems] + [Text("")] * bool(problems)
    parts += [_stages(view, width), Text("")]
    if view.jobs:
        parts += [_jobs(view, width), Text("")]
    listeners = _listeners(view, width)
    n_lines = 2 + len(problems) + bool(problems) + len(view.stages) + 2 + (len(view.jobs) + 2) * bool(view.jobs)
    left = None if height is None else max(1, height - n_lines - listeners.row_count - 4)
    parts += [*_releases(view, width, left), Text(""), listeners]
    return Group(*parts)


def _table(width: int, rows: Sequence[Mapping[str, str]], least: Sequence[str] = ()) -> Any:
    """A table of rows by column, the first of which is text and the others are numbers.

    Args:
        width: that it may have.
        rows: with the same columns.
        least: columns that are left out if it is too wide, in this order.
    """
    from rich.table import Table

    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in (rows[0] if rows else ())}
    for name in least:
        if sum(widths.values()) + 2 * (len(widths) - 1) > width:
            del widths[name]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(widths):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in widths))
    return table


def _stages(view: View, width: int) -> Any:
    is_alone = len({each.stage for each in view.stages}) == len(view.stages)
    rows = []
    for each in view.stages:
        queue, compute, hop = (each.phases[name].p99_ms if name in each.phases else None for name in ("queue", "compute", "hop"))
        rows.append(
            {
                "stage": each.stage if is_alone else f"{each.stage} {urlsplit(each.url).netloc}",
                "ready": _yes(each.is_ready),
                "req/s": _number(each.requests_per_s),
                "err/s": _number(sum(each.errors_per_s.values())),
                "p50 ms": _number(each.latency.p50_ms),
                "p99 ms": _number(each.latency.p99_ms),
                "queue p99": _number(queue),
                "compute p99": _number(compute),
                "hop p99": _number(hop),
                "rows/call": _number(each.rows_per_call),
                "req/call": _number(each.requests_per_call),
                "queued": str(each.queued),
                "in flight": str(each.in_flight),
                "refused/s": _number(sum(each.refusals_per_s.values())),
                "retries/s": _number(sum(each.retries_per_s.values())),
                "replicas": f"{each.replicas.get('ready', 0)}/{sum(each.replicas.values())}" if each.replicas else "-",
            }
        )
    return _table(width, rows, ("retries/s", "req/call", "hop p99", "compute p99", "queue p99", "refused/s", "in flight"))


def _releases(view: View, width: int, n_lines: int | None) -> list[RenderableType]:
    """Those of the first stage of each model, the busiest first."""
    from rich.text import Text

    ranks = {stage: rank for rank, stage in enumerate(dict.fromkeys(each.stage for each in view.stages))}
    first: dict[str, int] = {}
    for each in view.releases:
        first[each.model] = min(first.get(each.model, len(ranks)), ranks[each.stage])
    found = [each for each in view.releases if ranks[each.stage] == first[each.model]]
    found.sort(key=lambda each: (-(each.requests_per_s or 0.0), each.model, each.release))
    shown = found if n_lines is None or len(found) <= n_lines else found[: n_lines - 1]
    is_alone = len({(each.model, each.release) for each in found}) == len(found)
    golden = {
        (each.model, each.release): each.golden_error_ratio for each in view.releases if each.golden_error_ratio is not None
    }
    rows = [
        {
            "model": each.model if is_alone else f"{each.model} {urlsplit(each.url).netloc}",
            "release": each.release,
            "ready": "no" if each.ready_since is None else _age(view.time - each.ready_since),
            "req/s": _number(each.requests_per_s),
            "err/s": _number(each.failures_per_s),
            "rows/s": _number(each.rows_per_s),
            "mean ms": _number(each.mean_ms),
            "queued": str(each.queued),
            "in flight": str(each.in_flight),
            "golden error": _number(golden.get((each.model, each.release))),
        }
        for each in shown
    ]
    if not found:
        return [Text("no releases")]
    more = [Text(f"... and {len(found) - len(shown)} more")] if len(shown) < len(found) else []
    return [_table(width, rows, ("golden error", "queued", "in flight")), *more]


def _jobs(view: View, width: int) -> Any:
    rows = [
        {
            "jobs": urlsplit(each.url).netloc,
            "ready": _yes(each.is_ready),
            "queued": str(each.queued),
            "running": str(each.running),
            "oldest": _age(each.oldest_queued_s) if each.queued else "-",
            "attempts/s": _number(each.attempts_per_s),
            "webhooks": str(each.webhooks_pending),
        }
        for each in view.jobs
    ]
    return _table(width, rows)


def _listeners(view: View, width: int) -> Any:
    rows = [
        {
            "process": urlsplit(each.url).netloc,
            "version": each.version,
            "workers": "-" if each.workers is None else f"{each.workers_up}/{each.workers}",
            "CPU cores": _number(each.cpu_cores),
            "memory MiB": "-" if each.memory_bytes is None else str(round(each.memory_bytes / _MIB)),
            "loop lag p99 ms": _number(each.loop_lag_p99_ms),
        }
        for each in view.listeners
        if not each.problem
    ]
    return _table(width, rows)


def _problems(view: View) -> list[str]:
    """What does not answer or is not ready, and errors by code."""
    found = []
    for each in view.listeners:
        where = urlsplit(each.url).netloc
        if each.problem:
            found.append(f"{where}: {each.problem}")
            continue
        if each.workers is not None and each.workers_up != each.workers:
            found.append(f"{where}: {each.workers_up} of {each.workers} workers answer")
        if each.not_ready_reason:
            found.append(f"{where}: not ready: {each.not_ready_reason[:300]}")
    for stage in view.stages:
        if stage.errors_per_s:
            codes = ", ".join(f"{code} {_number(rate)}/s" for code, rate in sorted(stage.errors_per_s.items()))
            found.append(f"{stage.stage}: errors: {codes}")
    return found


def _yes(is_it: bool) -> str:
    return "yes" if is_it else "no"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "inf" if value > 0 else "-"
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
