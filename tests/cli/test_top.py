"""``splitserve top`` against admin listeners that answer what the test says."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import ssl
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from splitserve.cli.top import CannotStart, Credentials, Watcher, targets
from splitserve.telemetry import families
from splitserve.telemetry.views import View
from tests.admin_server import admin_server, of_a_proxy, text_of
from tests.certificates import write
from tests.command_line import run_command

BEFORE, AFTER = text_of(of_a_proxy(n_answered=100)), text_of(of_a_proxy(n_answered=150, n_failed=5))
ONCE = ("top", "--once", "--interval", "0.1", "--timeout-s", "60")
TOKEN = "0123456789abcdef"


def seen(*arguments: object) -> dict[str, Any]:
    """The view as JSON."""
    result = run_command(*ONCE, "--json", *arguments)
    assert result.exit_code == 0, result.output
    view: dict[str, Any] = json.loads(result.stdout)
    return view


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def test_once_shows_what_happens_now() -> None:
    """The increase between two scrapes, not what was counted since the start."""
    with admin_server(BEFORE, AFTER) as server:
        view = seen("--url", server.url)

    [stage] = view["stages"]
    assert stage["requests_per_s"] * view["interval_s"] == pytest.approx(55, rel=0.05)
    assert stage["latency"] == {"p50_ms": 1.5, "p99_ms": 1.99}
    assert stage["errors_per_s"].keys() == {"UNAVAILABLE"}
    assert [(each["model"], each["release"]) for each in view["releases"]] == [("m", "1.1")]


def test_in_a_pipe_it_prints_plain_text() -> None:
    """No control sequences; tables with stages, releases and errors."""
    with admin_server(BEFORE, AFTER, reason="draining") as server:
        result = run_command(*ONCE, "-u", server.url)

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "\x1b" not in result.stdout
    assert any(line.startswith("proxy ") and "1/2" in line for line in lines)
    assert any(line.startswith("m ") and "1.1" in line for line in lines)
    assert any("UNAVAILABLE" in line for line in lines)
    assert any("not ready: draining" in line for line in lines)


def test_without_a_listener_it_says_where_it_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what to do, at status 1."""
    ports = {f"{service}_ADMIN_PORT": str(unused_port()) for service in ("PROXY", "PREPROCESS", "PREDICT", "JOBS")}
    for name, port in ports.items():
        monkeypatch.setenv(name, port)

    result = run_command(*ONCE)

    assert result.exit_code == 1
    assert all(f"127.0.0.1:{port}: connection refused" in result.stderr for port in ports.values())
    assert "--admin-port" in result.stderr
    assert not result.stdout


def test_services_that_do_not_run_here_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused service has one listener; without an argument all four places are asked."""
    for service in ("PREPROCESS", "PREDICT", "JOBS"):
        monkeypatch.setenv(f"{service}_ADMIN_PORT", str(unused_port()))
    with admin_server(BEFORE, AFTER) as server:
        monkeypatch.setenv("PROXY_ADMIN_PORT", server.url.rpartition(":")[2])
        view = seen()
        named = seen("-u", server.url, "-u", str(unused_port()))

    assert [each["problem"] for each in view["listeners"]] == [""]
    assert [each["problem"] for each in named["listeners"]] == ["", "connection refused"]


def test_a_service_that_has_gone_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it was not named: it has answered before."""
    for service in NAMES[1:]:
        monkeypatch.setenv(f"{service}_ADMIN_PORT", str(unused_port()))
    with admin_server(BEFORE) as server, ExitStack() as gone:
        other = gone.enter_context(admin_server(BEFORE))
        monkeypatch.setenv("PROXY_ADMIN_PORT", server.url.rpartition(":")[2])
        monkeypatch.setenv("PREPROCESS_ADMIN_PORT", other.url.rpartition(":")[2])

        async def look_twice() -> list[View]:
            async with Watcher(targets((), "", is_tls=False), Credentials(), timeout_s=60, is_named=False) as watcher:
                first = await watcher.look()
                await asyncio.to_thread(gone.close)
                return [first, await watcher.look()]

        views = asyncio.run(look_twice())

    assert [[each.problem for each in view.listeners] for view in views] == [["", ""], ["", "connection refused"]]


def test_a_token_is_asked_for_and_sent(tmp_path: Path) -> None:
    """From a file, as the listener has it."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    with admin_server(BEFORE, AFTER, token=TOKEN) as server:
        without = run_command(*ONCE, "-u", server.url)
        view = seen("-u", server.url, "--token-file", file)

    assert without.exit_code == 1
    assert "--token-file" in without.stderr
    assert view["stages"]


def test_tls_is_verified(tmp_path: Path) -> None:
    """With the authority that a file names; each wrong way says what to do."""
    files = write(tmp_path / "admin", trustme.CA())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    with admin_server(BEFORE, tls=context) as server, admin_server(BEFORE) as plain:
        untrusted = run_command(*ONCE, "-u", server.url)
        not_tls = run_command(*ONCE, "-u", server.url.replace("https", "http"))
        no_tls_there = run_command(*ONCE, "-u", plain.url.replace("http", "https"))
        view = seen("-u", server.url.removeprefix("https://"), "--ca-file", files.ca)

    assert view["stages"]
    assert "--ca-file" in untrusted.stderr
    assert "https://" in not_tls.stderr
    assert "use http://" in no_tls_there.stderr
    assert {result.exit_code for result in (untrusted, not_tls, no_tls_there)} == {1}


def test_values_that_are_not_finite_are_shown() -> None:
    """A golden sample that has no tolerance and differs is infinitely far."""
    odd = of_a_proxy(n_answered=1)
    odd[families.GOLDEN_ERROR.name] = {("proxy", "m", "1.1"): math.inf}
    odd[families.QUEUED.name] = {("proxy", "m", "1.1"): math.nan}
    with admin_server(text_of(odd)) as server:
        as_text = run_command(*ONCE, "-u", server.url)
        as_json = run_command(*ONCE, "-u", server.url, "--json")

    assert (as_text.exit_code, as_json.exit_code) == (0, 0)
    assert "inf" in as_text.stdout
    assert json.loads(as_json.stdout)["releases"][0]["golden_error_ratio"] is None


def test_workers_that_do_not_answer_are_shown() -> None:
    """Also if that is all of them: then there is nothing else to show."""
    up, down = ({families.WORKER_UP.name: {("0",): 0, ("1",): n}} for n in (1, 0))
    with admin_server(text_of(up)) as half, admin_server(text_of(down), reason="no worker answers") as none:
        result = run_command(*ONCE, "-u", half.url, "-u", none.url)

    assert result.exit_code == 0
    assert "1 of 2 workers answer" in result.stdout
    assert "0 of 2 workers answer" in result.stdout
    assert "no worker answers" in result.stdout


def test_another_program_is_not_taken_for_a_service() -> None:
    """It may listen on the port, and even have metrics."""
    with admin_server("made_total 1\n") as other, admin_server("<html>") as page:
        results = [run_command(*ONCE, "-u", server.url) for server in (other, page)]

    assert [result.exit_code for result in results] == [1, 1]
    assert all("no metrics of splitserve" in result.stderr for result in results)


@pytest.mark.parametrize("arguments", [
    ("-u", "nowhere"), ("-u", "ftp://127.0.0.1:1"), ("-u", "http://127.0.0.1"), ("-u", "http://127.0.0.1:99999"),
    ("-u", "http://127.0.0.1:1/other"), ("--admin-port", "off"), ("--admin-port", "0"), ("--admin-port", "65530"),
    ("-u", "1", "--token-file", "/nowhere"), ("-u", "1", "--ca-file", "/nowhere"), ("--interval", "0"),
])  # fmt: skip
def test_options_that_cannot_be_used_are_refused(arguments: tuple[str, ...]) -> None:
    """At status 2, naming the option."""
    result = run_command("top", "--once", *arguments)

    assert result.exit_code == 2
    assert max(arguments, key=lambda each: each.startswith("--")).replace("-u", "--url") in result.stderr


def test_it_asks_where_services_of_this_machine_listen() -> None:
    """The ports of their settings, or of `splitserve up --admin-port`; ports that nobody can know are left out."""
    here = "http://127.0.0.1"

    assert targets((), "", is_tls=False, environment={}) == [f"{here}:{port}" for port in (8002, 8012, 8022, 8032)]
    assert targets((), "9000", is_tls=False, environment={"PROXY_ADMIN_PORT": "7"}) == [
        f"{here}:{port}" for port in (9000, 9010, 9020, 9030)
    ]
    settings = {"PROXY_ADMIN_PORT": "7", "PREDICT_ADMIN_PORT": "off", "JOBS_ADMIN_PORT": "0"}
    assert targets((), "", is_tls=True, environment=settings) == ["https://127.0.0.1:7", "https://127.0.0.1:8012"]
    assert targets(("8002", "proxy:8002", "[::1]:8002"), "", is_tls=False) == [
        f"{here}:8002", "http://proxy:8002", "http://[::1]:8002",
    ]  # fmt: skip
    with pytest.raises(CannotStart, match="--url"):
        targets((), "", is_tls=False, environment=dict.fromkeys((f"{each}_ADMIN_PORT" for each in NAMES), "off"))


NAMES = ("PROXY", "PREPROCESS", "PREDICT", "JOBS")
