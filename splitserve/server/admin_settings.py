"""Settings of a service's admin listener, mixed into each service's settings class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from splitserve.server.tls import ServerTls
from splitserve.server.tls_settings import checked_certificates, checked_client_ca, checked_key


def _port(value: Any) -> Any:
    if value == "off":
        return value
    try:
        port = int(value)
    except (TypeError, ValueError):
        port = -1
    if not 0 <= port <= MAX_PORT:
        raise ValueError(f'expected a port up to {MAX_PORT}, 0 for any free one, or "off", got "{value}"')
    return port


MAX_PORT = 65535


AdminPort = Annotated[int | Literal["off"], BeforeValidator(_port)]


class AdminSettings(BaseSettings):
    """The admin listener: metrics, probes, log level (docs/telemetry.md)."""

    model_config = SettingsConfigDict(use_attribute_docstrings=True)

    admin_port: AdminPort = 0
    """Port of the admin listener; 0: any free one; off: none."""

    admin_host: str = "127.0.0.1"
    """Address that it listens on. What is there is for operators: do not publish it."""

    admin_allowed_hosts: str = ""
    """Names, separated by commas, that requests to it may have in their Host header, besides addresses, names without a dot, and
    ADMIN_HOST: against DNS rebinding."""

    admin_token_file: str = ""
    """File with a bearer token, at least 16 characters. All its paths but `/livez` and `/readyz` require it; without one, the log
    level cannot be changed."""

    admin_tls_cert_file: str = ""
    """PEM file of its certificate and chain. If set, it accepts TLS only."""

    admin_tls_key_file: str = Field("", validate_default=True)
    """PEM file of the certificate's private key, without a passphrase."""

    admin_tls_client_ca_file: str = ""
    """PEM file of certificate authorities: clients must present a certificate that one of them signed."""

    @property
    def admin_tls(self) -> ServerTls | None:
        """Files of the admin listener; None: plain text."""
        if not self.admin_tls_cert_file:
            return None
        return ServerTls(self.admin_tls_cert_file, self.admin_tls_key_file, self.admin_tls_client_ca_file)

    @property
    def admin_token(self) -> str:
        """The token; "": none."""
        return read_token(self.admin_token_file) if self.admin_token_file else ""

    @field_validator("admin_token_file")
    @classmethod
    def _check_token(cls, path: str) -> str:
        if path:
            read_token(path)
        return path

    @field_validator("admin_tls_cert_file")
    @classmethod
    def _check_admin_certificates(cls, path: str) -> str:
        return checked_certificates(path)

    @field_validator("admin_tls_client_ca_file")
    @classmethod
    def _check_admin_client_ca(cls, path: str, info: ValidationInfo) -> str:
        return checked_client_ca(path, "ADMIN_TLS_CERT_FILE", info.data.get("admin_tls_cert_file"))

    @field_validator("admin_tls_key_file")
    @classmethod
    def _check_admin_key(cls, path: str, info: ValidationInfo) -> str:
        return checked_key(path, "ADMIN_TLS_CERT_FILE", info.data.get("admin_tls_cert_file"))


def read_token(path: str) -> str:
    """The token in a file, without the white space around it.

    Raises:
        ValueError: it cannot be read, or is too short to be a secret.
    """
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise ValueError(f"{path}: {reason}") from None
    if len(token) < MIN_TOKEN_LENGTH or any(character.isspace() for character in token):
        raise ValueError(f"{path}: expected one token of at least {MIN_TOKEN_LENGTH} characters")
    return token


MIN_TOKEN_LENGTH = 16
