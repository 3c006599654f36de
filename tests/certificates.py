"""Certificates for tests, made by trustme: an authority, servers and clients that it signed, as files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import trustme

from splitserve.server.tls import ServerTls
from splitserve.tls import ClientTls


class Files(NamedTuple):
    """Paths of PEM files."""

    ca: str
    cert: str
    key: str

    @property
    def server(self) -> ServerTls:
        """TLS without client certificates."""
        return ServerTls(self.cert, self.key)

    @property
    def mutual(self) -> ServerTls:
        """TLS with client certificates of the same authority."""
        return ServerTls(self.cert, self.key, self.ca)

    @property
    def client(self) -> ClientTls:
        """A caller with a certificate."""
        return ClientTls(self.ca, self.cert, self.key)

    @property
    def trusting(self) -> ClientTls:
        """A caller without one."""
        return ClientTls(self.ca)


def write(folder: Path, ca: trustme.CA, *, names: tuple[str, ...] = ("127.0.0.1", "localhost")) -> Files:
    """A certificate for these names into files, in place of those that were there."""
    folder.mkdir(exist_ok=True)
    issued = ca.issue_cert(*names)
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    files = {"ca": ca.cert_pem.bytes(), "cert": chain, "key": issued.private_key_pem.bytes()}
    for name, content in files.items():
        replace(str(folder / f"{name}.pem"), content)
    return Files(*(str(folder / f"{name}.pem") for name in files))


def replace(path: str, content: bytes) -> None:
    """Put a file in the place of another, at once."""
    Path(f"{path}.new").write_bytes(content)
    Path(f"{path}.new").replace(path)
