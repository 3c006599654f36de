"""How the commands reach a running system: over TLS and with a token, if the environment says so (docs/security.md)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from splitserve import tls
from splitserve.remote.inference import RemoteInference

if TYPE_CHECKING:
    from splitserve.client import Client

_FILES = "SPLITSERVE_CA_FILE, _CERT_FILE, _KEY_FILE or _TOKEN_FILE"


def connect(url: str) -> RemoteInference:
    """The proxy at ``url``. Files that cannot be used end the process with a line that says why."""
    try:
        return RemoteInference(url, stage="proxy", tls=tls.from_environment(), token=tls.token_from_environment())
    except (OSError, ValueError) as error:
        print(f"{_FILES}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def client(url: str, *, timeout_s: float) -> Client:
    """The system at ``url``, over REST or gRPC. An address or files that cannot be used end the process, as for `connect`."""
    from splitserve.client import TLS, Client

    try:
        files = tls.from_environment()
        return Client(
            url,
            timeout_s=timeout_s,
            max_attempts=1,
            tls=TLS(ca_file=files.ca_file, cert_file=files.cert_file or None, key_file=files.key_file or None) if files else None,
            token=tls.token_from_environment() or None,
        )
    except OSError as error:
        print(f"{_FILES}: {error}", file=sys.stderr)
    except ValueError as error:
        print(error, file=sys.stderr)
    raise SystemExit(2)
