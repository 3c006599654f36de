"""``splitserve top`` on a terminal, and in a pipe whose reader leaves."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator

import pytest

from tests.admin_server import AdminServer, admin_server, of_a_proxy, text_of
from tests.system.processes import PATIENCE_S

LEAVE_SCREEN, SHOW_CURSOR = b"\x1b[?1049l", b"\x1b[?25h"


@pytest.fixture
def server() -> Iterator[AdminServer]:
    with admin_server(text_of(of_a_proxy(n_answered=100))) as server:
        yield server


def command(server: AdminServer) -> list[str]:
    return [sys.executable, "-m", "splitserve", "top", "--interval", "0.1", "--timeout-s", "60", "--url", server.url]


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = self.attributes()
        self.process = subprocess.Popen(
            arguments,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.shown = b""

    def attributes(self) -> object:
        return termios.tcgetattr(self._slave)

    def read_until(self, text: bytes) -> None:
        """Wait until it has shown a text."""
        while text not in self.shown:
            self.shown += os.read(self._master, 65536)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@pytest.mark.parametrize("leave", [
    lambda terminal: terminal.type(b"q"),
    lambda terminal: terminal.type(b"\x03"),
    lambda terminal: terminal.type(b"\x1a\x1c"),
    lambda terminal: terminal.process.send_signal(signal.SIGTERM),
], ids=["q", "Ctrl-C", "Ctrl-Z and Ctrl-backslash", "SIGTERM"])  # fmt: skip
def test_it_leaves_the_terminal_as_it_was(server: AdminServer, leave: Callable[[Terminal], None]) -> None:
    """However it is left: the screen, the cursor, and how keys are read."""
    terminal = Terminal(command(server))
    try:
        terminal.read_until(b"of the last")
        assert b"1.1" in terminal.shown
        assert terminal.attributes() != terminal.before

        leave(terminal)
        terminal.read_until(LEAVE_SCREEN)

        assert terminal.process.wait(PATIENCE_S) == 0
        assert terminal.attributes() == terminal.before
        assert SHOW_CURSOR in terminal.shown
    finally:
        terminal.close()


def test_a_reader_that_leaves_ends_it(server: AdminServer) -> None:
    """As in `splitserve top | head`: without a traceback."""
    process = subprocess.Popen(command(server), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stdout, process.stderr:
        assert process.stdout.readline().startswith(b"splitserve top")
        process.stdout.close()

        assert process.wait(PATIENCE_S) == 0
        assert process.stderr.read() == b""
