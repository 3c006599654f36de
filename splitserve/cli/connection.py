"""How the commands reach a running system: over TLS and with a token, if the environment says so (docs/security.md)."""

from __future__ import annotations

import sys

from splitserve import tls
from splitserve.remote import RemoteInference


def connect(url: str) -> RemoteInference:
    """The proxy at ``url``. Files that can not be used end the process with a line that says why."""
    try:
        return RemoteInference(url, stage="proxy", tls=tls.from_environment(), token=tls.token_from_environment())
    except (OSError, ValueError) as error:
        print(f"SPLITSERVE_CA_FILE, _CERT_FILE, _KEY_FILE or _TOKEN_FILE: {error}", file=sys.stderr)
        raise SystemExit(2) from None
