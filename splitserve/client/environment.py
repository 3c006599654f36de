"""What the environment says of a client: certificates and a token (docs/security.md)."""

from __future__ import annotations

from typing import Any

from splitserve import tls
from splitserve.client.connection import TLS


def arguments_from_environment() -> dict[str, Any]:
    """The arguments ``tls`` and ``token`` of a client, from the environment.

    Raises:
        OSError, ValueError: a file cannot be used.
    """
    files = tls.from_environment()
    return {
        "tls": TLS(ca_file=files.ca_file, cert_file=files.cert_file or None, key_file=files.key_file or None) if files else None,
        "token": tls.token_from_environment() or None,
    }
