"""The headers and trailers of a response: validation, and the status that they carry.

Source: RFC 9113, sections 8.1.1, 8.2 and 8.3.2; gRPC, doc/PROTOCOL-HTTP2.md, Responses.
"""

from __future__ import annotations

import msgspec

from splitserve.wire.grpc.messages import CallError, percent_decode, status_name
from splitserve.wire.grpc.request import is_valid_field
from splitserve.wire.http2.headers import Headers


class ResponseHeaders(msgspec.Struct, frozen=True):
    """What a header block says. Parsed once for equal blocks."""

    fields: dict[bytes, bytes]
    http_status: bytes = b""
    """The value of ``:status``; empty in trailers."""

    is_malformed: bool = False

    @property
    def is_informational(self) -> bool:
        """Whether the final headers are still to come. Source: RFC 9110, section 15.2."""
        return self.http_status.startswith(b"1")

    @property
    def content_length(self) -> int:
        """Declared size of the body; -1: none is declared."""
        value = self.fields.get(b"content-length", b"")
        return int(value) if value.isdigit() else -1

    def status(self) -> CallError:
        """How the call ended, if this is the end of its stream; OK is an error with that code."""
        if b"grpc-status" not in self.fields:
            return CallError("UNAVAILABLE", f"HTTP status {self.http_status.decode(errors='replace')[:8] or '?'}")
        return CallError(status_name(self.fields[b"grpc-status"]), percent_decode(self.fields.get(b"grpc-message", b"")))


_MALFORMED = ResponseHeaders({}, is_malformed=True)


def parse_response_headers(headers: Headers) -> ResponseHeaders:
    """Validate and interpret a header list."""
    fields: dict[bytes, bytes] = {}
    http_status = b""
    for name, value in headers:
        if name.startswith(b":"):
            if fields or http_status or name != b":status" or not (value.isdigit() and len(value) == 3):
                return _MALFORMED
            http_status = value
        elif not is_valid_field(name, value):
            return _MALFORMED
        else:
            fields[name] = value.strip(b" \t")
    return ResponseHeaders(fields, http_status)
