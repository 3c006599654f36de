"""The releases of a model in a folder: an append-only log that several publishers may write.

A record is written under a temporary name and renamed, so a reader never sees a partial one. Its sequence number is allocated by
the exclusive creation of a file of that number, which works on network file systems and in buckets too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from splitserve.durable import sync_folder
from splitserve.repository.manifest import MANIFEST_FILE, BundleError, FileDigest
from splitserve.repository.release import (
    MAX_SEQUENCE,
    RELEASES_FOLDER,
    Release,
    ReleaseKey,
    ReleaseManifest,
    decode,
    encode,
    parse_folder_name,
)
from splitserve.versions import is_number

try:
    import fcntl
except ImportError:  # a platform without flock: scratch folders are not swept there
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".publishing"
"""Locked, shared, by each process that publishes a model; a process that gets it exclusively knows that no scratch folder is
in use."""

SCRATCH_PREFIX = ".scratch-"
SCRATCH_AGE_S = 3600.0
"""Scratch folders older than this, left by a publisher that was killed, are removed by the next one."""

MakeRecord = Callable[[int], tuple[ReleaseManifest, Mapping[str, bytes]]]
"""The manifest and files of a record, by the sequence number that it gets. Called again with the next one on conflict."""


def listing(root: Path, model: str) -> list[ReleaseKey]:
    """Keys of all records of a model, by sequence.

    Raises:
        BundleError: the folder cannot be read.
    """
    return records_in(root / model / RELEASES_FOLDER, model)


def records_in(folder: Path, model: str) -> list[ReleaseKey]:
    """Keys of the records of a model in a folder, by sequence; none if it does not exist.

    Raises:
        BundleError: it cannot be read.
    """
    return sorted(_records(folder, model))


def has_records(folder: Path, model: str) -> bool:
    """Whether there is a record of a model in a folder; not if it does not exist.

    Raises:
        BundleError: it cannot be read.
    """
    return next(_records(folder, model), None) is not None


def _records(folder: Path, model: str) -> Iterator[ReleaseKey]:
    try:
        with os.scandir(folder) as entries:
            yield from (key for entry in entries if (key := parse_folder_name(model, entry.name)) and entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise BundleError(f"{model}/{RELEASES_FOLDER}: cannot be read: {error.strerror}") from error


def append(root: Path, model: str, make: MakeRecord) -> Release:
    """Add a record to the releases of a model.

    Args:
        root: of the model repository.
        model: whose releases.
        make: what is recorded.

    Raises:
        BundleError: the repository cannot be written.
    """
    folder = root / model / RELEASES_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _allocated(root, model) as sequence:
            manifest, files = make(sequence)
            data = encode(manifest)
            write_folder(folder / manifest.key.folder_name, {**files, MANIFEST_FILE: data})
    except OSError as error:
        raise BundleError(f"{model}/{RELEASES_FOLDER}: cannot be written: {error.strerror}") from error
    return Release(decode(data, manifest.key), hashlib.sha256(data).hexdigest())


def digests(files: Mapping[str, bytes]) -> dict[str, FileDigest]:
    """What a manifest says of its files."""
    return {name: FileDigest(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}


@contextlib.contextmanager
def allocated(
    following: Callable[[], int], claim: Callable[[int], bool], unclaim: Callable[[int], None], *, first: int = 1
) -> Iterator[int]:
    """A sequence number that is this process's alone. A number whose publisher was killed stays unused: gaps do no harm.

    Args:
        following: the number after the highest one recorded, as a listing shows it now.
        claim: create the marker of a number; False if somebody has.
        unclaim: remove it.
        first: the lowest number to try.

    Raises:
        BundleError: numbers are used up: a record with a higher one would never be read.
    """
    sequence = max(first, following())
    while True:
        if sequence > MAX_SEQUENCE:
            raise BundleError(
                f"expected the next sequence number to be at most {MAX_SEQUENCE}, got {sequence}: a folder in {RELEASES_FOLDER} "
                "that no publisher made has the highest one; remove it"
            )
        if not claim(sequence):
            sequence += 1
            continue
        if sequence >= (free := following()):
            break
        unclaim(sequence)  # between listing and creation the number was used, and its marker removed
        sequence = free
    try:
        yield sequence
    finally:
        unclaim(sequence)


def marker_name(sequence: int) -> str:
    """The file whose exclusive creation allocates a sequence number. No record is called so."""
    return f".{sequence:04d}"


def marked(name: str) -> int:
    """The sequence number of a marker's name; 0 if it is no marker."""
    number = name.removeprefix(".")
    return int(number) if number != name and number.isdecimal() and marker_name(int(number)) == name else 0


def _allocated(root: Path, model: str) -> contextlib.AbstractContextManager[int]:
    folder = root / model / RELEASES_FOLDER

    def claim(sequence: int) -> bool:
        try:
            (folder / marker_name(sequence)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def unclaim(sequence: int) -> None:
        with contextlib.suppress(OSError):  # what was recorded counts; the number stays unused, and gaps do no harm
            (folder / marker_name(sequence)).unlink()

    return allocated(lambda: _next_sequence(root, model), claim, unclaim)


def _next_sequence(root: Path, model: str) -> int:
    return max((key.sequence for key in listing(root, model)), default=0) + 1


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder whole or not at all: under a temporary name, synced, then renamed.

    Args:
        folder: its final place; the parent exists.
        files: contents by name.

    Raises:
        FileExistsError: it exists.
        OSError: it cannot be written.
    """
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=folder.parent))
    try:
        for name, data in files.items():
            with (scratch / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        scratch.chmod(0o755)
        _sync_folder(scratch)
        if folder.exists():
            raise FileExistsError(f"{folder} exists")
        scratch.rename(folder)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and folder.exists():  # another one was written in between
            raise FileExistsError(f"{folder} exists") from error
        raise
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Make names in a folder durable, where the file system can."""
    with contextlib.suppress(OSError):
        sync_folder(folder)


@contextlib.contextmanager
def publishing(root: Path, model: str) -> Iterator[None]:
    """Held while a model is published to. A process that holds it exclusively removes leftovers of killed publishers.

    Raises:
        BundleError: the repository cannot be written.
    """
    try:
        (root / model).mkdir(parents=True, exist_ok=True)
        file = (root / model / LOCK_FILE).open("ab")
    except OSError as error:
        raise BundleError(f"{model}: cannot be written: {error.strerror}") from error
    with file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # others publish now, or the file system has no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _sweep(root / model)
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _sweep(model: Path) -> None:
    """Remove scratch folders, and markers of sequence numbers, that are older than an hour."""
    oldest = time.time() - SCRATCH_AGE_S
    for part in ("preprocess", "predict", RELEASES_FOLDER):
        for left in filter(_is_ours, (model / part).glob(".*")):
            with contextlib.suppress(OSError):
                if left.lstat().st_mtime < oldest:
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _is_ours(path: Path) -> bool:
    """Whether a hidden name is that of a marker, or of a scratch folder of a bundle or record. Others are somebody else's."""
    name = path.name
    return bool(marked(name)) or name.startswith(SCRATCH_PREFIX) or is_number(name[1:].partition("-")[0])
