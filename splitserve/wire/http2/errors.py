"""HTTP/2 errors. Error codes are in `frames`."""

from __future__ import annotations


class Http2ConnectionError(Exception):
    """The peer broke a rule in a way that ends the connection. Source: RFC 9113, section 5.4.1.

    Args:
        code: of the GOAWAY frame.
        message: its debug data.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
