"""A tracking server for tests of what reads MLflow's registry: the part of its REST interface that is used, and faults.

`tests/pipeline/test_registry.py` runs the same against MLflow's own server.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from splitserve.repository.folder import Repository
from splitserve.repository.sources import index
from tests.file_server import FileServer, Handler

API = "api/2.0/mlflow/"
ARTIFACTS = "api/2.0/mlflow-artifacts/artifacts/"
ALIAS = f"{API}registered-models/alias"


class RegistryServer(FileServer):
    """Registered models with their aliases; the files of versions are below a folder and proxied.

    ``authorization`` is the header that requests need; None: none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listen(RegistryHandler)
        self.versions: dict[tuple[str, str], dict[str, object]] = {}
        self.uris: dict[tuple[str, str], str] = {}
        self.aliases: dict[tuple[str, str], str] = {}
        self.authorization: str | None = None
        self.authorizations: set[str | None] = set()
        """Those that requests came with."""

    def register(self, model: str, version: str, repository: Repository, *, uri: str = "", alias: str = "champion") -> None:
        """Register a repository as it is, with its index, and let an alias name it."""
        data = index.write(repository.root, index.build(repository)[0]).read_bytes()
        tags = [{"key": "splitserve.index", "value": hashlib.sha256(data).hexdigest()}]
        self.versions[(model, version)] = {
            "name": model,
            "version": version,
            "creation_timestamp": 1764529200000 + len(self.versions),
            "status": "READY",
            "tags": tags,
        }
        self.uris[(model, version)] = uri or f"mlflow-artifacts:/{repository.root.relative_to(self.folder)}"
        self.aliases[(model, alias)] = version


class RegistryHandler(Handler):
    """MLflow's answers."""

    files: RegistryServer

    def do_GET(self) -> None:  # noqa: N802 - the name is http.server's
        parts = urlsplit(self.path)
        path = parts.path.lstrip("/")
        given = self.headers.get("Authorization")
        self.files.authorizations.add(given)
        if self.files.authorization is not None and given != self.files.authorization:
            self.answer(403 if given else 401, b"Permission denied")
        elif path.startswith(ARTIFACTS):
            self.path = f"/{path.removeprefix(ARTIFACTS)}"
            super().do_GET()
        else:
            fault = self.take_fault(path, 0)
            status, body = self._called(path.removeprefix(API), {name: found[0] for name, found in parse_qs(parts.query).items()})
            data = json.dumps(body).encode()
            if fault is None or not fault(self, data):
                self.answer(status, data)

    def _called(self, method: str, query: dict[str, str]) -> tuple[int, object]:
        model, version = query.get("name", ""), query.get("version", "")
        if not any(model == name for name, _ in self.files.versions):
            return 404, _unknown(f"Registered Model with name={model} not found")
        if method == "registered-models/alias":
            found = self.files.aliases.get((model, query["alias"]))
            if found is None:
                return 400, {
                    "error_code": "INVALID_PARAMETER_VALUE",
                    "message": f"Registered model alias {query['alias']} not found.",
                }
            version = found
        if (model, version) not in self.files.versions:
            return 404, _unknown(f"Model Version (name={model}, version={version}) not found")
        if method == "model-versions/get-download-uri":
            return 200, {"artifact_uri": self.files.uris[(model, version)]}
        return 200, {"model_version": self.files.versions[(model, version)]}


def _unknown(message: str) -> dict[str, str]:
    return {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": message}
