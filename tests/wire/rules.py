"""Rules of a protocol as data: the section, what the peer sends, the expected reaction. `docs/wire.md` is written from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from splitserve.wire.http2 import frames
from splitserve.wire.http2.headers import encode
from tests.wire.fakes import ECHO, framed, request_headers

ERROR_CODES = (
    "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED", "FRAME_SIZE_ERROR",
    "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
)  # fmt: skip


@dataclass(frozen=True)
class Goaway:
    """GOAWAY with this code, naming the last stream that was processed, and the connection is closed."""

    code: int
    last_stream: int = 0

    def __str__(self) -> str:
        return f"connection error {ERROR_CODES[self.code]}"


@dataclass(frozen=True)
class Reset:
    """RST_STREAM with this code; the connection lives."""

    code: int
    stream: int = 1

    def __str__(self) -> str:
        return f"stream error {ERROR_CODES[self.code]}"


@dataclass(frozen=True)
class Answered:
    """The call gets this gRPC status; the connection lives."""

    status: str = "0"
    stream: int = 1
    http_status: str = "200"

    def __str__(self) -> str:
        return f"answered, HTTP {self.http_status}" if self.http_status != "200" else f"answered, grpc-status {self.status}"


@dataclass(frozen=True)
class Ended:
    """A client's call ends with this gRPC status."""

    status: str

    def __str__(self) -> str:
        return f"the call ends, {self.status}"


@dataclass(frozen=True)
class Replies:
    """Exactly these frames; the connection lives."""

    data: bytes = b""

    def __str__(self) -> str:
        kinds = ("DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE")
        return f"{kinds[self.data[3]]} in reply" if self.data else "ignored"


IGNORED = Replies()
Outcome = Goaway | Reset | Answered | Ended | Replies


@dataclass(frozen=True)
class Rule:
    """One rule for an endpoint that receives.

    Args:
        section: of the specification.
        rule: in a sentence.
        sends: what the peer sends, after its preface and the acknowledgement of our SETTINGS unless ``is_raw``.
        outcome: what must come back.
        not_kept: why the outcome is deliberately another one than the specification's; "" if it is kept.
        is_raw: ``sends`` is all that the peer sends.
    """

    section: str
    rule: str
    sends: Sequence[bytes]
    outcome: Outcome
    not_kept: str = ""
    is_raw: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.section} {self.rule}"


class Shown(Protocol):
    """What a row of a table needs."""

    @property
    def section(self) -> str: ...

    @property
    def rule(self) -> str: ...

    @property
    def not_kept(self) -> str: ...

    @property
    def outcome(self) -> object: ...


def markdown(rules: Sequence[Shown]) -> list[str]:
    """The rows of a table."""
    lines = ["| section | rule | what comes back | kept |", "|---|---|---|---|"]
    for rule in rules:
        kept = f"deliberately not: {rule.not_kept}" if rule.not_kept else "yes"
        lines.append(f"| {rule.section} | {rule.rule} | {rule.outcome} | {kept} |")
    return lines


# Frames of a client.


def block(*headers: tuple[str, str], path: str = ECHO) -> bytes:
    """A call's header block, with more headers."""
    return encode([(name.encode(), value.encode("latin-1")) for name, value in [*request_headers(path), *headers]])


def raw_block(*headers: tuple[str, str]) -> bytes:
    """These headers only."""
    return encode([(name.encode(), value.encode("latin-1")) for name, value in headers])


def headers(stream: int = 1, payload: bytes | None = None, flags: int = frames.END_HEADERS) -> bytes:
    """HEADERS; of a call unless a block is given."""
    return frames.frame(frames.HEADERS, flags, stream, block() if payload is None else payload)


def data(stream: int = 1, payload: bytes | None = None, flags: int = frames.END_STREAM) -> bytes:
    """DATA; a whole message, and the last, unless said otherwise."""
    return frames.frame(frames.DATA, flags, stream, framed(b"x") if payload is None else payload)


def call(stream: int = 1, *more: tuple[str, str], path: str = ECHO) -> bytes:
    """A whole call."""
    return headers(stream, block(*more, path=path)) + data(stream)
