"""A folder as storage is mounted into a container: a model repository, the folder of one model in it, or a single bundle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from splitserve.repository import manifest as manifests
from splitserve.repository import release_log
from splitserve.repository.bundle import KINDS, Bundle, BundleKey
from splitserve.repository.files import read_small
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import MANIFEST_FILE, BundleError, Kind, Manifest, NotFetched
from splitserve.repository.release import RELEASES_FOLDER, ReleaseKey
from splitserve.repository.releases import ReleaseFolder
from splitserve.repository.routes import ROUTE_FILE, Route, StoredRoute


class LocalFolder:
    """A `BundleSource`. The layout of the folder is detected at every poll: storage may be filled after the start."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._seen: Repository | None = None

    def bundles(self) -> Iterator[BundleKey]:
        """All bundles, by model, kind and version.

        Raises:
            NotFetched: the folder does not exist: what was mounted there is not there now.
        """
        if not self.root.is_dir():
            raise NotFetched(f"{self.root}: no such folder")
        self._seen = self._repository()
        return self._seen.bundles()

    def route(self, model: str) -> Route | None:
        """The route of a model, if it has one."""
        return (self._seen or self._repository()).route(model)

    def read_route(self, model: str) -> StoredRoute | None:
        """As `Repository.read_route`."""
        return (self._seen or self._repository()).read_route(model)

    def open(self, key: BundleKey) -> Bundle:
        """As `Repository.open`."""
        return self._repository().open(key)

    def released_models(self) -> list[str]:
        """As `Repository.released_models`."""
        return (self._seen or self._repository()).released_models()

    def releases(self, model: str) -> list[ReleaseKey]:
        """As `Repository.releases`."""
        return (self._seen or self._repository()).releases(model)

    def open_release(self, key: ReleaseKey) -> ReleaseFolder:
        """As `Repository.open_release`."""
        return (self._seen or self._repository()).open_release(key)

    def stamp(self, key: BundleKey | ReleaseKey, /) -> str:
        """As `Repository.stamp`."""
        return (self._seen or self._repository()).stamp(key)

    def close(self) -> None:
        """Nothing is fetched from a folder."""

    def _repository(self) -> Repository:
        if (self.root / MANIFEST_FILE).exists():
            return _SingleBundle(self.root)
        found = [path for kind in KINDS for path in sorted(self.root.glob(f"{kind}/[1-9]*/{MANIFEST_FILE}"))]
        return _ModelFolder(self.root, _name_in(found)) if found else Repository(self.root)


class _SingleBundle(Repository):
    """The root is a bundle; its manifest has the model's name and the version."""

    def bundles(self) -> Iterator[BundleKey]:
        manifest = _read(self.root / MANIFEST_FILE)
        yield BundleKey(manifest.name, manifest.kind, manifest.version)

    def read_route(self, model: str) -> StoredRoute | None:
        return None

    def released_models(self) -> list[str]:
        return []

    def releases(self, model: str) -> list[ReleaseKey]:
        return []

    def folder(self, key: BundleKey | ReleaseKey) -> Path:
        return self.root


class _ModelFolder(Repository):
    """The root is the folder of one model; its manifests have the model's name, the folder may have another."""

    def __init__(self, root: Path, model: str) -> None:
        super().__init__(root)
        self._model = model

    def bundles(self) -> Iterator[BundleKey]:
        for kind in KINDS:
            yield from (BundleKey(self._model, kind, version) for version in self.versions(self._model, kind))

    def versions(self, model: str, kind: Kind) -> list[int]:
        return Repository(self.root.parent).versions(self.root.name, kind)

    def route_file(self, model: str) -> Path:
        return self.root / ROUTE_FILE

    def released_models(self) -> list[str]:
        return [self._model] if release_log.has_records(self.root / RELEASES_FOLDER, self._model) else []

    def releases(self, model: str) -> list[ReleaseKey]:
        return release_log.records_in(self.root / RELEASES_FOLDER, model) if model == self._model else []

    def folder(self, key: BundleKey | ReleaseKey) -> Path:
        return self.root / str(key).removeprefix(f"{key.model}/")


def _name_in(files: Sequence[Path]) -> str:
    """The model's name in the first of these manifests that is valid.

    Raises:
        BundleError: none is valid.
    """
    for path in files[:-1]:
        with contextlib.suppress(BundleError):
            return _read(path).name
    return _read(files[-1]).name


def _read(path: Path) -> Manifest:
    return manifests.decode(read_small(path))
