"""When the certificates of a process expire, as samples of `splitserve.telemetry.families`.

The standard library reads dates only of certificates that a connection has presented, so a few fields of DER are read here.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from splitserve.server.settings import ServiceSettings
from splitserve.server.tls import ServerTls
from splitserve.server.tls_settings import ListenerTlsSettings, NextStageTlsSettings
from splitserve.telemetry.families import CERTIFICATE_EXPIRY
from splitserve.telemetry.registry import Sample
from splitserve.tls import ClientTls
from splitserve.watched import Watched

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VERSION, _UTC_TIME = 0xA0, 0x17
"""Tags. The version may be absent."""


Times = dict[str, float]
"""Unix time by use."""


def expiry_times(path: str) -> list[float]:
    """When each certificate of a PEM file expires, in Unix time.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no certificate.
    """
    times = [_not_after(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))) for pem in _PEM.findall(Path(path).read_bytes())]
    if not times:
        raise ValueError(f"{path}: expected a PEM certificate")
    return times


def _not_after(certificate: bytes) -> float:
    """The end of a certificate's validity. Source: RFC 5280, section 4.1."""
    to_be_signed = _elements(_elements(certificate)[0][1])[0][1]
    fields = _elements(to_be_signed)
    _, validity = fields[4 if fields[0][0] == _VERSION else 3]
    tag, text = _elements(validity)[1]
    digits = text.decode("ascii")
    if tag == _UTC_TIME:
        digits = ("20" if digits < "50" else "19") + digits
    return datetime.strptime(digits, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _elements(der: bytes) -> list[tuple[int, bytes]]:
    """The elements that follow each other in DER, each as its tag and its content."""
    found = []
    while der:
        tag, length, begin = der[0], der[1], 2
        if length & 0x80:
            begin += length & 0x7F
            length = int.from_bytes(der[2:begin], "big")
        found.append((tag, der[begin : begin + length]))
        der = der[begin + length :]
    return found


class CertificateMetrics:
    """When the certificates in use expire; files are read again when they change.

    Args:
        config: names the files.
    """

    def __init__(self, config: ServiceSettings) -> None:
        self._config = config
        self._watched: list[Watched[Times]] | None = None

    async def refresh(self) -> None:
        """Read what has changed; files that TLS rejects are rejected here too.

        Raises OSError or ValueError until all files could be read once.
        """
        if self._watched is None:
            self._watched = [Watched(files, read) for files, read in _uses(self._config)]
        for watched in self._watched:
            watched.has_changed()

    def collect(self) -> Iterator[Sample]:
        for watched in self._watched or ():
            for use, time in watched.value.items():
                yield Sample(CERTIFICATE_EXPIRY, (use,), time)


def _uses(config: ServiceSettings) -> Iterator[tuple[list[str], Callable[[], Times]]]:
    """The files of each use of TLS that is configured, and what reads them, with the checks of that use."""
    listeners = {"admin": config.admin_tls}
    if isinstance(config, ListenerTlsSettings):
        listeners["server"] = config.tls
    for use, tls in listeners.items():
        if tls is not None:
            yield tls.files, partial(_of_listener, use, tls)
    if isinstance(config, NextStageTlsSettings) and (next_tls := config.next_tls) is not None:
        yield next_tls.files, partial(_of_client, next_tls)


def _of_listener(use: str, tls: ServerTls) -> Times:
    tls.check()
    return _times(use, tls.cert_file, tls.client_ca_file)


def _of_client(tls: ClientTls) -> Times:
    tls.ssl_context()
    return _times("client", tls.cert_file, tls.ca_file)


def _times(use: str, cert_file: str, ca_file: str) -> Times:
    """A chain expires with its first certificate that does; authorities with the last, since each is trusted on its own."""
    times = {use: min(expiry_times(cert_file))} if cert_file else {}
    return times | {f"{use} CA": max(expiry_times(ca_file))} if ca_file else times
