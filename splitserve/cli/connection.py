"""The commands' connection to a running system, with TLS and a token from the environment (docs/security.md)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from splitserve import tls
from splitserve.remote.inference import RemoteInference

if TYPE_CHECKING:
    from splitserve.client import Client

_FILES = "SPLITSERVE_CA_FILE, _CERT_FILE, _KEY_FILE or _TOKEN_FILE"


def connect(url: str, *, stage: str = "proxy") -> RemoteInference:
    """Connect to the proxy, or another stage, at ``url``. An invalid address or invalid files end the process with the reason."""
    if is_client_url(url):
        print(f'expected the address of a gRPC face, host:port, got "{url}"', file=sys.stderr)
        raise SystemExit(2)
    try:
        return RemoteInference(
            url.removeprefix("grpc://"), stage=stage, tls=tls.from_environment(), token=tls.token_from_environment()
        )
    except (OSError, ValueError) as error:
        print(f"{_FILES}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def is_client_url(url: str) -> bool:
    """Whether a URL is one for `client` rather than for `connect`: of REST, or of gRPC with TLS."""
    return url.startswith(("http://", "https://", "grpcs://"))


def client(url: str, *, timeout_s: float) -> Client:
    """A client of the system at ``url``, over REST or gRPC. An invalid address or invalid files end the process."""
    from splitserve.client import Client
    from splitserve.client.environment import arguments_from_environment

    try:
        return Client(url, timeout_s=timeout_s, max_attempts=1, **arguments_from_environment())
    except OSError as error:
        print(f"{_FILES}: {error}", file=sys.stderr)
    except ValueError as error:
        print(error, file=sys.stderr)
    raise SystemExit(2)
