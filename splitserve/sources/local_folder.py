"""A folder as storage is mounted into a container: a model repository, the folder of one model in it, or a single bundle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from splitserve import manifest as manifests
from splitserve import routes
from splitserve.manifest import MANIFEST_FILE, Kind, Manifest
from splitserve.repository import KINDS, Bundle, BundleKey, Repository, read_small
from splitserve.routes import ROUTE_FILE, Route


class LocalFolder:
    """A `BundleSource`. What the folder is, is looked at anew each time: storage may be filled late."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def bundles(self) -> Iterator[BundleKey]:
        """All bundles, by model, kind and version."""
        return self._repository().bundles()

    def routes(self) -> dict[str, Route]:
        """The routes of the models that have one."""
        return self._repository().routes()

    def open(self, key: BundleKey) -> Bundle:
        """As `Repository.open`."""
        return self._repository().open(key)

    def close(self) -> None:
        """Nothing is ever under way."""

    def _repository(self) -> Repository:
        if (self.root / MANIFEST_FILE).exists():
            return _SingleBundle(self.root)
        manifest = next((path for kind in KINDS for path in sorted(self.root.glob(f"{kind}/[1-9]*/{MANIFEST_FILE}"))), None)
        return _ModelFolder(self.root, _read(manifest).name) if manifest else Repository(self.root)


class _SingleBundle(Repository):
    """The root is a bundle. It has the name and the version that its manifest says."""

    def bundles(self) -> Iterator[BundleKey]:
        manifest = _read(self.root / MANIFEST_FILE)
        yield BundleKey(manifest.name, manifest.kind, manifest.version)

    def routes(self) -> dict[str, Route]:
        return {}

    def folder(self, key: BundleKey) -> Path:
        return self.root


class _ModelFolder(Repository):
    """The root is the folder of one model, called what its manifests say, whatever the folder is called."""

    def __init__(self, root: Path, model: str) -> None:
        super().__init__(root)
        self._model = model

    def bundles(self) -> Iterator[BundleKey]:
        for kind in KINDS:
            yield from (BundleKey(self._model, kind, version) for version in self.versions(self._model, kind))

    def versions(self, model: str, kind: Kind) -> list[int]:
        return Repository(self.root.parent).versions(self.root.name, kind)

    def routes(self) -> dict[str, Route]:
        file = self.root / ROUTE_FILE
        return {self._model: routes.decode(read_small(file))} if file.exists() else {}

    def folder(self, key: BundleKey) -> Path:
        return self.root / key.kind / str(key.version)


def _read(path: Path) -> Manifest:
    return manifests.decode(read_small(path))
