"""What the headers of a call say, and whether they are those of one.

Source: RFC 9113, sections 8.2 and 8.3; gRPC, doc/PROTOCOL-HTTP2.md, Requests.
"""

from __future__ import annotations

import re

import msgspec

from splitserve.wire.grpc.messages import CONTENT_TYPE, ENCODINGS, CallError, timeout_s
from splitserve.wire.http2.headers import Headers


class Request(msgspec.Struct, frozen=True):
    """What the headers of a call say. Made once for equal headers."""

    path: str
    timeout_s: float | None
    encoding: bytes
    metadata: tuple[tuple[str, str], ...]
    refusal: CallError | None = None
    is_malformed: bool = False
    is_grpc: bool = True


_MALFORMED = Request("", None, b"", (), is_malformed=True)
_NAME = re.compile(rb"[^\x00-\x20A-Z\x7f-\xff:]+")
_OF_HTTP_1 = (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")


def understand(headers: Headers) -> Request:
    """What they say."""
    pseudo: dict[bytes, bytes] = {}
    metadata: dict[bytes, bytes] = {}
    for name, value in headers:
        if name.startswith(b":"):
            if metadata or name in pseudo or name not in (b":method", b":scheme", b":path", b":authority"):
                return _MALFORMED
            pseudo[name] = value
        elif not _NAME.fullmatch(name) or name in _OF_HTTP_1 or any(byte in value for byte in b"\0\r\n"):
            return _MALFORMED
        else:
            metadata[name] = b"%b,%b" % (metadata[name], value) if name in metadata else value
    if pseudo.get(b":method") != b"POST" or not pseudo.get(b":path") or b":scheme" not in pseudo:
        return _MALFORMED
    refusal, timeout = None, metadata.pop(b"grpc-timeout", None)
    encoding = metadata.get(b"grpc-encoding", b"identity")
    try:
        seconds = None if timeout is None else timeout_s(timeout)
    except ValueError:
        seconds = None
        refusal = CallError("INVALID_ARGUMENT", "grpc-timeout: expected up to 8 digits and one of H, M, S, m, u, n")
    if encoding != b"identity" and encoding not in ENCODINGS:
        refusal = CallError("UNIMPLEMENTED", "grpc-encoding: only identity, deflate and gzip are taken")
    return Request(
        path=pseudo[b":path"].decode(errors="replace"),
        timeout_s=seconds,
        encoding=b"" if encoding == b"identity" else encoding,
        metadata=tuple((name.decode(errors="replace"), value.decode(errors="replace")) for name, value in metadata.items()),
        refusal=refusal,
        is_grpc=metadata.get(b"content-type", b"").startswith(CONTENT_TYPE),
    )
