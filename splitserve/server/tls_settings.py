"""Settings of TLS, mixed into each service's settings class: for its ports, and for its calls to the next service."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from splitserve.server.tls import ServerTls
from splitserve.tls import ClientTls, check_certificates, check_key


class ListenerTlsSettings(BaseSettings):
    """TLS of a service's ports."""

    model_config = SettingsConfigDict(use_attribute_docstrings=True)

    tls_cert_file: str = ""
    """PEM file of this service's certificate and its chain. If set, all ports accept TLS only. Certificates and keys are
    reloaded when their files change."""

    tls_key_file: str = Field("", validate_default=True)
    """PEM file of the certificate's private key, without a passphrase."""

    tls_client_ca_file: str = ""
    """PEM file of certificate authorities: clients must present a certificate that one of them signed (mutual TLS)."""

    @property
    def tls(self) -> ServerTls | None:
        """Files of the ports; None: plain text."""
        return ServerTls(self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file) if self.tls_cert_file else None

    @field_validator("tls_cert_file")
    @classmethod
    def _check_certificates(cls, path: str) -> str:
        return checked_certificates(path)

    @field_validator("tls_client_ca_file")
    @classmethod
    def _check_client_ca(cls, path: str, info: ValidationInfo) -> str:
        return checked_client_ca(path, "TLS_CERT_FILE", info.data.get("tls_cert_file"))

    @field_validator("tls_key_file")
    @classmethod
    def _check_key(cls, path: str, info: ValidationInfo) -> str:
        return checked_key(path, "TLS_CERT_FILE", info.data.get("tls_cert_file"))


class NextStageTlsSettings(BaseSettings):
    """TLS of the calls to the next service."""

    model_config = SettingsConfigDict(use_attribute_docstrings=True)

    next_ca_file: str = ""
    """PEM file of the certificate authorities that the next service's certificate is verified by. If set, it is called over TLS
    only."""

    next_cert_file: str = ""
    """PEM file of the client certificate that is presented to the next service, if it asks for one."""

    next_key_file: str = Field("", validate_default=True)
    """PEM file of that certificate's private key, without a passphrase."""

    next_server_name: str = ""
    """Name that the next service's certificate must have; by default the host of its target."""

    @property
    def next_tls(self) -> ClientTls | None:
        """Files of the channel to the next service; None: plain text."""
        if not self.next_ca_file:
            return None
        return ClientTls(self.next_ca_file, self.next_cert_file, self.next_key_file, self.next_server_name)

    @field_validator("next_ca_file", "next_cert_file")
    @classmethod
    def _check_next_certificates(cls, path: str) -> str:
        return checked_certificates(path)

    @field_validator("next_cert_file", "next_server_name")
    @classmethod
    def _check_needs_ca(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("next_ca_file") == "":
            raise ValueError("needs NEXT_CA_FILE too: without it the next service is called in plain text")
        return value

    @field_validator("next_key_file")
    @classmethod
    def _check_next_key(cls, path: str, info: ValidationInfo) -> str:
        return checked_key(path, "NEXT_CERT_FILE", info.data.get("next_cert_file"))


def checked_certificates(path: str) -> str:
    """The path, if its file holds certificates or it is empty. Raises ValueError."""
    if path:
        _check_files(lambda: check_certificates(path))
    return path


def checked_client_ca(path: str, cert_setting: str, cert_file: str | None) -> str:
    """The path, if its file holds certificates and there is TLS, or it is empty. Raises ValueError.

    ``cert_file`` is None if it is invalid, which is another error.
    """
    if path and cert_file == "":
        raise ValueError(f"needs {cert_setting} too: client certificates require TLS")
    return checked_certificates(path)


def checked_key(path: str, cert_setting: str, cert_file: str | None) -> str:
    """The path, if its file is the key of the certificate or both are empty. Raises ValueError.

    ``cert_file`` is None if it is invalid; then the key is not checked.
    """
    if cert_file is not None and bool(path) != bool(cert_file):
        raise ValueError(f"this and {cert_setting} must be set together")
    if cert_file and path:
        _check_files(lambda: check_key(cert_file, path))
    return path


def _check_files(check: Callable[[], None]) -> None:
    """Raise an OSError as the ValueError that pydantic reports."""
    try:
        check()
    except OSError as error:
        raise ValueError(str(error)) from None
