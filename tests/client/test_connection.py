"""URLs, certificates and tokens."""

from __future__ import annotations

import pytest

from splitserve.client import TLS
from splitserve.client.connection import ConnectionOptions, connection_options, request_headers, request_headers_async
from splitserve.errors import Unauthenticated


def connect(url: str, tls: TLS | None = None) -> ConnectionOptions:
    return connection_options(url, tls=tls, compression=None, max_message_bytes=1, headers=None)


@pytest.mark.parametrize(
    ("url", "target", "is_rest", "is_secure"),
    [
        ("http://host", "http://host", True, False),
        ("http://host:8000/", "http://host:8000", True, False),
        ("https://host/behind/a/path", "https://host/behind/a/path", True, True),
        ("grpc://host:8001", "host:8001", False, False),
        ("grpcs://host:8001/", "host:8001", False, True),
        ("grpc://[::1]:8001", "[::1]:8001", False, False),
        ("HTTPS://host", "https://host", True, True),
        ("GRPC://host:8001", "host:8001", False, False),
        ("127.0.0.1:8001", "127.0.0.1:8001", False, False),
        ("dns:///proxy:8001", "dns:///proxy:8001", False, False),
        ("unix:/run/proxy.sock", "unix:/run/proxy.sock", False, False),
        ("unix:///run/proxy.sock", "unix:///run/proxy.sock", False, False),
    ],
)
def test_the_url_determines_the_protocol(url: str, target: str, is_rest: bool, is_secure: bool) -> None:
    """http and https are REST; all else is gRPC, with its own names."""
    found = connect(url)

    assert (found.target, found.is_rest, found.tls is not None) == (target, is_rest, is_secure)


def test_certificates_make_a_bare_name_secure() -> None:
    """Certificates imply TLS."""
    assert connect("host:8001", TLS(ca_file="ca.pem")).tls == TLS(ca_file="ca.pem")


@pytest.mark.parametrize("url", ["http://", "grpc://", "grpc://host", "grpcs://host/", "grpc://host:port", ""])
def test_a_url_without_a_host_or_port_is_refused(url: str) -> None:
    """At once, not at the first call."""
    with pytest.raises(ValueError, match="expected a"):
        connect(url)


@pytest.mark.parametrize("url", ["ftp://host:21", "ws://host:8000", "htp://host:8000", "tcp://host:8001"])
def test_a_scheme_that_is_none_is_refused(url: str) -> None:
    """At once; it is no name that gRPC resolves either."""
    with pytest.raises(ValueError, match=r"expected http://, https://, grpc://, grpcs:// or .* got the scheme"):
        connect(url)


@pytest.mark.parametrize("url", ["http://host", "grpc://host:1"])
def test_plain_text_and_certificates_contradict_each_other(url: str) -> None:
    """The secure scheme is named."""
    with pytest.raises(ValueError, match=r"https://|grpcs://"):
        connect(url, TLS())


def test_a_certificate_without_its_key_is_refused() -> None:
    """And the reverse."""
    with pytest.raises(ValueError, match="expected both cert_file and key_file"):
        TLS(cert_file="client.pem")


def test_an_unknown_compression_is_refused() -> None:
    """The known one is named."""
    with pytest.raises(ValueError, match='expected "gzip"'):
        connection_options("host:1", tls=None, compression="zstd", max_message_bytes=1, headers=None)  # type: ignore[arg-type]


async def test_a_token_is_text_or_a_function() -> None:
    """Asked for every request; whitespace around it, as files have, is not part of it."""

    async def later() -> str:
        return "later"

    assert request_headers({"a": "b"}, " secret\n") == {"a": "b", "authorization": "Bearer secret"}
    assert request_headers({}, lambda: "fresh") == {"authorization": "Bearer fresh"}
    assert request_headers({}, None) == {}
    assert await request_headers_async({}, lambda: "fresh") == {"authorization": "Bearer fresh"}
    assert await request_headers_async({}, later) == {"authorization": "Bearer later"}


@pytest.mark.parametrize("token", ["", " ", "a b", "a\nb: c", "ä"])
def test_a_token_that_no_header_can_hold_is_refused(token: str) -> None:
    """A line break in it could inject a header."""
    with pytest.raises(Unauthenticated):
        request_headers({}, token)
