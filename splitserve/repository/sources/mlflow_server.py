"""MLflow's tracking server by its REST interface: which version of a registered model is meant, and the files that it has.

MLflow itself is not imported, and files are read only. Source: MLflow, ``model_registry.proto`` and ``mlflow_artifacts.proto``.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from splitserve.repository.files import MAX_SMALL_FILE_BYTES
from splitserve.repository.manifest import BundleError, NotFetched
from splitserve.repository.sources import MLFLOW
from splitserve.repository.sources.cache import Download
from splitserve.repository.sources.remote_folder import CANCELLED

INDEX_TAG = "splitserve.index"
"""Tag of a registered version: the sha256 of its ``index.json``."""

_NAMED = re.compile(r"(?P<model>[^/:@,]+)(?:@(?P<alias>[^/:@,]+)|/(?P<version>[1-9][0-9]*))")
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
"""Below it a tracking server, and one with ``--artifacts-only``, has the files that it proxies."""

T = TypeVar("T")


class NamedVersion(msgspec.Struct, frozen=True):
    """A version of a registered model, by its alias or its number; the other is ""."""

    model: str
    alias: str
    version: str

    def __str__(self) -> str:
        return MLFLOW + (f"{self.model}@{self.alias}" if self.alias else f"{self.model}/{self.version}")


class RegisteredVersion(msgspec.Struct, frozen=True):
    """A version as the registry has it. ``created`` tells it from a deleted one of the same number."""

    version: str
    created: int
    artifacts: str
    index_sha256: str


class _Tag(msgspec.Struct):
    key: str
    value: str = ""


class _ModelVersion(msgspec.Struct):
    version: str
    creation_timestamp: int = 0
    status: str = "READY"
    tags: list[_Tag] = []


class _OneVersion(msgspec.Struct):
    model_version: _ModelVersion


class _DownloadUri(msgspec.Struct):
    artifact_uri: str


class _Error(msgspec.Struct):
    message: str = ""


# Made at import for the reason in `splitserve.repository.manifest`.
_one_version = msgspec.json.Decoder(_OneVersion, strict=False)
_download_uri = msgspec.json.Decoder(_DownloadUri)
_error = msgspec.json.Decoder(_Error)


def parse(where: str) -> list[NamedVersion]:
    """The versions in e.g. ``mlflow:penguins@champion,wine/3``.

    Raises:
        ValueError: a part of it is not understood.
    """
    found = []
    for part in where.removeprefix(MLFLOW).split(","):
        match = _NAMED.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"{where}: expected mlflow:MODEL@ALIAS or mlflow:MODEL/VERSION, several separated by commas; got {part.strip()!r}"
            )
        found.append(NamedVersion(match["model"], match["alias"] or "", match["version"] or ""))
    return found


def server_uris(environment: Mapping[str, str]) -> tuple[str, str]:
    """URLs of the registry and of the tracking server, as MLflow's own variables name them.

    Raises:
        ValueError: they name none, or something else.
    """
    tracking, registry = environment.get("MLFLOW_TRACKING_URI", ""), environment.get("MLFLOW_REGISTRY_URI", "")
    if not tracking and not registry:
        raise ValueError(f"{MLFLOW} needs MLFLOW_TRACKING_URI, the URL of a tracking server")
    for name, uri in (("MLFLOW_TRACKING_URI", tracking), ("MLFLOW_REGISTRY_URI", registry)):
        parts = urlsplit(uri)
        if uri and not (parts.scheme in ("http", "https") and parts.hostname):
            raise ValueError(
                f"{name}: expected the URL of a tracking server, http:// or https://, got {without_credentials(uri)}"
            )
    return (registry or tracking).rstrip("/"), (tracking or registry).rstrip("/")


class MlflowServer:
    """A tracking server, or a registry. Connects when it is first used.

    Args:
        uri: its URL; may have a user and a password.
        environment: MLflow's variables with credentials and certificates.
        timeout_s: of connecting, and of waiting for more of an answer.

    Raises:
        ValueError: a certificate cannot be read.
    """

    def __init__(self, uri: str, environment: Mapping[str, str], *, timeout_s: float) -> None:
        self.url = without_credentials(uri)
        """Without user and password."""
        self._timeout_s = timeout_s
        self._is_closed = threading.Event()
        self._connections: set[Any] = set()
        """Those on which an answer arrives, as httpcore's network streams."""
        headers = {"Accept-Encoding": "identity"}
        user, password = (environment.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
        auth = (user, password) if user and password else None
        if auth is None and (token := environment.get("MLFLOW_TRACKING_TOKEN", "")):
            headers["Authorization"] = f"Bearer {token}"
        self._http = httpx.Client(base_url=uri, timeout=timeout_s, headers=headers, auth=auth, verify=_verification(environment))

    def __str__(self) -> str:
        return self.url

    def resolve(self, named: NamedVersion) -> RegisteredVersion:
        """Which version is meant now, and where its files are.

        Raises:
            NotFetched: there is none, it is not ready, or the server does not say; a retry may help.
        """
        if named.alias:
            answer = self._ask(_one_version, "registered-models/alias", name=named.model, alias=named.alias)
        else:
            answer = self._ask(_one_version, "model-versions/get", name=named.model, version=named.version)
        found = answer.model_version
        if found.status != "READY":
            raise NotFetched(f"{self}: version {found.version} is {found.status}, expected READY")
        where = self._ask(_download_uri, "model-versions/get-download-uri", name=named.model, version=found.version)
        tags = {tag.key: tag.value for tag in found.tags}
        return RegisteredVersion(found.version, found.creation_timestamp, where.artifact_uri, tags.get(INDEX_TAG, ""))

    def _ask(self, decoder: msgspec.json.Decoder[T], method: str, **query: str) -> T:
        with self._answer(f"/api/2.0/mlflow/{method}", str(self), query) as answer:
            data = _all_of(answer, method)
        try:
            return decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NotFetched(f"{self}: expected an answer of MLflow, got another: {error}; is it a tracking server?") from None

    def read(self, path: str) -> bytes:
        """All of a small artifact that the server proxies.

        Raises:
            NotFetched: it cannot be fetched.
            BundleError: it is too large.
        """
        name = path.rpartition("/")[2]
        with self._answer(f"{ARTIFACTS}/{quote(path)}", name) as answer:
            return _all_of(answer, name)

    def stream(self, path: str, offset: int) -> Iterator[bytes]:
        """The bytes of an artifact that the server proxies, from an offset on. Not all versions of MLflow know ranges, so what is
        before it is read, and dropped.

        Raises:
            NotFetched: it cannot be fetched.
        """
        with self._answer(f"{ARTIFACTS}/{quote(path)}", path.rpartition("/")[2]) as answer:
            for block in answer.iter_bytes():
                if self._is_closed.is_set():
                    raise NotFetched("the service is stopping")
                kept = block[offset:]
                offset = max(0, offset - len(block))
                if kept:
                    yield kept

    @contextlib.contextmanager
    def _answer(self, path: str, what: str, query: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
        """A successful answer, whose body is to be read.

        Raises:
            NotFetched: there is none; the message starts with ``what``.
        """
        try:
            with self._http.stream("GET", path, params=query) as answer:
                if answer.status_code == httpx.codes.NOT_FOUND:
                    raise NotFetched(f"{what}: not found: {_said(answer)}") from FileNotFoundError()
                if answer.status_code != httpx.codes.OK:
                    raise NotFetched(f"{what}: {_refusal(answer)}")
                with self._receiving(answer):
                    yield answer
        except httpx.TimeoutException:
            raise NotFetched(f"{what}: no answer within {self._timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.StreamError, RuntimeError) as error:  # RuntimeError: the client is closed
            reason = "the service is stopping" if self._is_closed.is_set() else f"{type(error).__name__}: {error}"
            raise NotFetched(f"{what}: {reason}") from error

    @contextlib.contextmanager
    def _receiving(self, answer: httpx.Response) -> Iterator[None]:
        """While the body arrives, `close` finds its connection."""
        connection = answer.extensions["network_stream"]
        self._connections.add(connection)
        try:
            if self._is_closed.is_set():
                raise NotFetched("the service is stopping")
            yield
        finally:
            self._connections.discard(connection)

    def close(self) -> None:
        """Refuse new requests, and end answers that arrive: a thread that waits for more of one is woken."""
        self._is_closed.set()
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._http.close()


class ProxiedArtifacts:
    """The files of a version whose artifacts the tracking server proxies: a `Files` of `RemoteRepository`.

    Args:
        server: the tracking server.
        uri: ``mlflow-artifacts:/PATH``.

    Raises:
        BundleError: it is the URI of another server, which gets no credentials.
    """

    can_list = False

    def __init__(self, server: MlflowServer, uri: str) -> None:
        parts = urlsplit(uri)
        if parts.netloc and parts.netloc != urlsplit(server.url).netloc:
            raise BundleError(f"{uri}: expected artifacts of {server}, the server of MLFLOW_TRACKING_URI")
        self.url = f"{server}{ARTIFACTS}{parts.path}".rstrip("/")
        self._server = server
        self._path = parts.path.strip("/")
        self._is_closed = False

    def __str__(self) -> str:
        return self.url

    def list(self) -> dict[str, str]:
        """Not needed: there is an index."""
        raise NotImplementedError

    def read(self, path: str) -> bytes:
        """As `MlflowServer.read`."""
        return self._server.read(f"{self._path}/{path}")

    def download(self, path: str, size: int) -> Download:
        """A file; the server says nothing of its size."""

        def download(offset: int) -> Iterator[bytes]:
            for block in self._server.stream(f"{self._path}/{path}", offset):
                if self._is_closed:
                    raise NotFetched(f"{path.rpartition('/')[2]}: {CANCELLED}")
                yield block

        return download

    def close(self) -> None:
        """End downloads at their next block. The server is shared, and closed by its owner."""
        self._is_closed = True


def _all_of(answer: httpx.Response, name: str) -> bytes:
    """Raises:
    BundleError: it is too large.
    """
    data = bytearray()
    for block in answer.iter_bytes():
        data += block
        if len(data) > MAX_SMALL_FILE_BYTES:
            raise BundleError(f"{name} is too large; the limit is {MAX_SMALL_FILE_BYTES} bytes")
    return bytes(data)


def _said(answer: httpx.Response) -> str:
    """What an answer that is no success says: MLflow's message, else the reason of its status."""
    try:
        message = _error.decode(_all_of(answer, "error")).message
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, BundleError):
        message = ""
    return " ".join((message or answer.reason_phrase).split())[:300]


def _refusal(answer: httpx.Response) -> str:
    reason = f"HTTP status {answer.status_code} {_said(answer)}"
    if answer.status_code not in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return reason
    return (
        f"access denied: {reason}; MLflow's credentials are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
        "MLFLOW_TRACKING_TOKEN"
    )


def _verification(environment: Mapping[str, str]) -> ssl.SSLContext | bool:
    """How certificates are verified.

    Raises:
        ValueError: one cannot be read.
    """
    if environment.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return False
    authority = environment.get("MLFLOW_TRACKING_SERVER_CERT_PATH", "")
    own = environment.get("MLFLOW_TRACKING_CLIENT_CERT_PATH", "")
    if not authority and not own:
        return True
    try:
        context = ssl.create_default_context(cafile=authority or None)
        if own:
            context.load_cert_chain(own)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(
            f"MLFLOW_TRACKING_SERVER_CERT_PATH, MLFLOW_TRACKING_CLIENT_CERT_PATH: cannot be read: {error}"
        ) from error
    return context


def without_credentials(uri: str) -> str:
    """Without user, password and query."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
