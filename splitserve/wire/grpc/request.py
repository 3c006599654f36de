"""The headers of a call: validation, and what they say.

Source: RFC 9113, sections 8.1.1, 8.2 and 8.3; gRPC, doc/PROTOCOL-HTTP2.md, Requests.
"""

from __future__ import annotations

import re

import msgspec

from splitserve.wire.grpc.messages import CONTENT_TYPE, ENCODINGS, CallError, timeout_s
from splitserve.wire.http2.headers import Headers


class RequestHeaders(msgspec.Struct, frozen=True):
    """What a header block says. Parsed once for equal blocks."""

    path: str
    timeout_s: float | None
    encoding: bytes
    metadata: tuple[tuple[str, str], ...]
    rejection: CallError | None = None
    """The status of a call that cannot be served."""

    http_status: int = 200
    """Not 200 for requests that are HTTP but not gRPC."""

    content_length: int = -1
    """Declared size of the body; -1: none is declared."""

    is_malformed: bool = False
    """As a request; its stream is reset."""

    is_trailers: bool = False
    """Whether it is a valid trailer section, which is malformed as a request."""


_NAME = re.compile(rb"[^\x00-\x20A-Z\x7f-\xff:]+")
_FORBIDDEN_IN_VALUE = re.compile(rb"[\x00\r\n]")
_CONNECTION_SPECIFIC = (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
_PSEUDO = (b":method", b":scheme", b":path", b":authority")
_MALFORMED = RequestHeaders("", None, b"", (), is_malformed=True)


def parse_request_headers(headers: Headers) -> RequestHeaders:
    """Validate and interpret a header list.

    Values are stripped of leading and trailing whitespace rather than refused: clients of gRPC may send it (PROTOCOL-HTTP2,
    ASCII-Value).
    """
    pseudo: dict[bytes, bytes] = {}
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        if name.startswith(b":"):
            if fields or name in pseudo or name not in _PSEUDO:
                return _MALFORMED
            pseudo[name] = value
        elif not is_valid_field(name, value):
            return _MALFORMED
        else:
            value = value.strip(b" \t")
            fields[name] = (b"%b; %b" if name == b"cookie" else b"%b,%b") % (fields[name], value) if name in fields else value
    content_length = fields.get(b"content-length", b"")
    if content_length and not (content_length.isdigit() and len(content_length) < 19):
        return _MALFORMED
    if not pseudo:
        return RequestHeaders("", None, b"", (), is_malformed=True, is_trailers=True)
    if not _is_valid_request(pseudo):
        return _MALFORMED
    return _interpreted(pseudo, fields)


def is_grpc(content_type: bytes) -> bool:
    """Whether it is ``application/grpc``, with or without a codec (``+proto``) or parameters. gRPC-Web is another protocol."""
    return content_type.startswith(CONTENT_TYPE) and content_type[len(CONTENT_TYPE) :][:1] in (b"", b"+", b";")


def is_valid_field(name: bytes, value: bytes) -> bool:
    """Whether a field, not a pseudo-header, may be in a message. Source: RFC 9113, sections 8.2.1 and 8.2.2."""
    if not _NAME.fullmatch(name) or _FORBIDDEN_IN_VALUE.search(value) or name in _CONNECTION_SPECIFIC:
        return False
    return name != b"te" or value == b"trailers"


def _is_valid_request(pseudo: dict[bytes, bytes]) -> bool:
    if pseudo.get(b":method") == b"CONNECT":
        return b":scheme" not in pseudo and b":path" not in pseudo and b":authority" in pseudo
    return bool(pseudo.get(b":method") and pseudo.get(b":path") and pseudo.get(b":scheme"))


def _interpreted(pseudo: dict[bytes, bytes], fields: dict[bytes, bytes]) -> RequestHeaders:
    rejection, timeout = None, fields.pop(b"grpc-timeout", None)
    encoding = fields.get(b"grpc-encoding", b"identity")
    try:
        seconds = None if timeout is None else timeout_s(timeout)
    except ValueError:
        seconds = None
        rejection = CallError("INVALID_ARGUMENT", "grpc-timeout: expected up to 8 digits and one of H, M, S, m, u, n")
    if encoding != b"identity" and encoding not in ENCODINGS:
        rejection = CallError("UNIMPLEMENTED", "grpc-encoding: only identity, deflate and gzip are supported")
    http_status = 200
    if pseudo[b":method"] != b"POST":
        http_status, rejection = 405, CallError("UNIMPLEMENTED", "HTTP method: expected POST")
    elif not is_grpc(fields.get(b"content-type", b"")):
        http_status, rejection = 415, CallError("INVALID_ARGUMENT", "content-type: expected application/grpc")
    return RequestHeaders(
        path=pseudo.get(b":path", b"").decode(errors="replace"),
        timeout_s=seconds,
        encoding=b"" if encoding == b"identity" else encoding,
        metadata=tuple((name.decode(errors="replace"), value.decode(errors="replace")) for name, value in fields.items()),
        rejection=rejection,
        http_status=http_status,
        content_length=int(fields.get(b"content-length") or -1),
    )
