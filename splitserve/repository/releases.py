"""The releases of a model as a source has them: opened, checked, and read again only when they have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from splitserve.repository.files import check_file_list
from splitserve.repository.manifest import GOLDEN_FILE, MANIFEST_FILE, BundleError, NotFetched, NotSigned
from splitserve.repository.manifest_folder import ManifestFolder
from splitserve.repository.release import History, Release, ReleaseKey, ReleaseManifest, decode

MAX_GOLDEN_BYTES = 8 * 1024**2
"""Largest file of golden samples in a release."""

N_COMPARED = 16
"""How many of the newest records, and how many older ones in turn, are compared with their files each time."""


class ReleaseFolder(ManifestFolder[ReleaseKey, ReleaseManifest]):
    """A record of a release whose manifest has been read; its golden samples are checked as they are read."""

    @property
    def release(self) -> Release:
        return Release(self.manifest, self.manifest_sha256)


def decode_release(data: bytes, key: ReleaseKey) -> ReleaseManifest:
    """The manifest of a record, its list of files validated: golden samples, and nothing else.

    Raises:
        BundleError: as `splitserve.repository.release.decode`, or it lists a file that a release does not have.
    """
    manifest = decode(data, key)
    check_file_list(
        manifest.files,
        f"{key}: {MANIFEST_FILE}",
        is_name=GOLDEN_FILE.__eq__,
        expected=f"{GOLDEN_FILE} only",
        max_bytes=MAX_GOLDEN_BYTES,
    )
    return manifest


class ReleaseSource(Protocol):
    """A source of the records of releases."""

    def released_models(self) -> list[str]:
        """Names of the models that have a record, sorted, as of the last call of `bundles`.

        Raises:
            BundleError: they cannot be listed.
        """
        ...

    def releases(self, model: str) -> list[ReleaseKey]:
        """Keys of a model's records, by sequence, as of the last call of `bundles`.

        Raises:
            BundleError: they cannot be listed.
        """
        ...

    def open_release(self, key: ReleaseKey) -> ReleaseFolder:
        """A record with its manifest read.

        Raises:
            NotFetched: it cannot be read now, or is incomplete; a retry may help.
            BundleError: it is invalid.
        """
        ...

    def stamp(self, key: ReleaseKey, /) -> str:
        """A text that changes when the record's files change, with "manifest.json" in it if the record has one."""
        ...


class _Read(msgspec.Struct, frozen=True):
    """A record as of a stamp: the release, or why there is none."""

    stamp: str
    release: Release | None = None
    problem: str = ""


class _Known(msgspec.Struct, frozen=True):
    """The records of a model as of the last time, by key, and what follows from them."""

    read: dict[ReleaseKey, _Read]
    history: History
    problems: tuple[str, ...]


class ReleaseReader:
    """Histories of models. Records never change, so each is read once, and again only when its files have changed.

    Whether they have is asked for the newest `N_COMPARED` records each time, for as many older ones in turn, and for those with
    a problem: what a poll costs does not grow with the number of releases. An older record that was changed is noticed later,
    or when its golden samples are read. If nothing has changed, the `History` is the same object.

    A record that is invalid, or not signed where it must be, does not count; one that was valid when it was first read still
    counts. `problems` says why. One that is listed and cannot be fetched makes the history unknown: it may withdraw a release.

    Args:
        source: has the records.
    """

    def __init__(self, source: ReleaseSource) -> None:
        self._source = source
        self._known: dict[str, _Known] = {}
        self._turns: dict[str, int] = {}
        """By model, how many of its older records have been compared."""
        self.problems: dict[str, tuple[str, ...]] = {}
        """By model, what is wrong with its records."""

    def history(self, model: str) -> History:
        """All valid records of a model.

        Raises:
            NotFetched: a record cannot be read now.
            BundleError: the records cannot be listed.
        """
        keys = self._source.releases(model)
        known = self._known.get(model, _NOTHING_KNOWN)
        read = {key: known.read.get(key) for key in keys}
        is_changed = read.keys() != known.read.keys()
        try:
            for key in self._due(model, keys, read):
                before, read[key] = read[key], self._read(key, read[key])
                is_changed = is_changed or read[key] is not before
        finally:  # what was read before a record that cannot be fetched is not read again
            if is_changed:
                self._known[model] = known = _known(read)
        self.problems.pop(model, None)
        if known.problems:
            self.problems[model] = known.problems
        return known.history

    def forget(self, model: str) -> None:
        """Read a model's records again the next time."""
        self._known.pop(model, None)

    def _due(self, model: str, keys: Sequence[ReleaseKey], read: Mapping[ReleaseKey, _Read | None]) -> list[ReleaseKey]:
        """Records that are new, have a problem, or whose turn it is to be compared with their files, by sequence."""
        older = keys[:-N_COMPARED]
        start = self._turns.get(model, 0) % max(len(older), 1)
        self._turns[model] = start + N_COMPARED
        compared = {*keys[-N_COMPARED:], *older[start : start + N_COMPARED]}
        return [key for key in keys if (known := read[key]) is None or known.problem or key in compared]

    def _read(self, key: ReleaseKey, known: _Read | None) -> _Read:
        stamp = self._source.stamp(key)
        if known is not None and known.stamp == stamp and stamp:
            return known
        try:
            return _Read(stamp, self._source.open_release(key).release)
        except BundleError as error:
            problem = _naming(key, error)
            is_missing = isinstance(error, NotFetched) and not isinstance(error, NotSigned) and MANIFEST_FILE in stamp
            if known is None and is_missing:
                raise NotFetched(problem) from error
            return _Read(stamp, known.release if known else None, problem)


_NOTHING_KNOWN = _Known({}, History(), ())


def _known(read: Mapping[ReleaseKey, _Read | None]) -> _Known:
    found = {key: each for key, each in read.items() if each is not None}
    history = History(each.release for each in found.values() if each.release is not None)
    return _Known(found, history, tuple(each.problem for each in found.values() if each.problem))


def _naming(key: ReleaseKey, error: BundleError) -> str:
    text = str(error)
    return text if text.startswith(str(key)) else f"{key}: {text}"
