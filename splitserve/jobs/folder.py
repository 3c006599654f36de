"""The folder of a job store: whose it is, and whether it can be one."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

DATABASE, LOCK, PAYLOADS = "jobs.sqlite", "lock", "payloads"

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "afs",
        "ceph",
        "fuse.sshfs",
        "glusterfs",
        "fuse.glusterfs",
        "lustre",
        "virtiofs",
    }
)
"""File systems on which SQLite's locks or shared memory are not reliable."""


class FolderInUse(Exception):
    """Another process owns the folder; the message names it."""


class NetworkFileSystem(Exception):
    """The folder is on a network file system; the message names it and the way out."""


def check_file_system(folder: Path) -> None:
    """Raises:
    NetworkFileSystem: SQLite's WAL does not work on the file system of the folder.
    """
    kind = file_system_of(folder)
    if kind in NETWORK_FILE_SYSTEMS:
        raise NetworkFileSystem(
            f"{folder} is on {kind}, where SQLite can lose or corrupt jobs: use a local disk, or PostgreSQL (JOBS_DATABASE_URL)"
        )


def file_system_of(folder: Path, mounts: str = "/proc/self/mounts") -> str:
    """The type of the file system that a folder is on; "" where that is unknown."""
    try:
        lines = [line.split() for line in Path(mounts).read_text().splitlines()]
    except OSError:
        return ""
    found = folder.resolve()
    kinds = {Path(parts[1].replace("\\040", " ")): parts[2] for parts in lines if len(parts) > 2}
    return next((kinds[parent] for parent in (found, *found.parents) if parent in kinds), "")


def locked(path: Path, wait_s: float) -> int:
    """An exclusive lock on a file, which then names this process. The kernel releases it when the process ends."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() >= end:
                holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
                os.close(lock)
                raise FolderInUse(f"{path.parent} is in use by {holder or 'another process'}") from None
            time.sleep(0.05)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n".encode(), 0)
    return lock
