"""Programs that are built for a newer glibc than the machine's: started by the loader of Debian 13, unpacked next to them."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SUITE = "trixie"
PACKAGES = ("libc6", "libstdc++6", "libgcc-s1")


def machines_version() -> tuple[int, ...]:
    """Of the glibc that this process runs on."""
    libc = ctypes.CDLL("libc.so.6")
    libc.gnu_get_libc_version.restype = ctypes.c_char_p
    return tuple(map(int, libc.gnu_get_libc_version().split(b".")))


def loader_for(version: tuple[int, ...], home: Path) -> list[str]:
    """What to put before a program that needs this version; nothing if the machine has it.

    Args:
        version: of glibc.
        home: the folder to unpack in; made once.

    Skips the test where it cannot be had.
    """
    if machines_version() >= version:
        return []
    if not home.exists():
        _unpack(home)
    loader = next(home.glob("usr/lib/*/ld-linux-*.so.*"))
    return [str(loader), "--library-path", f"{loader.parent}:/usr/lib/{loader.parent.name}"]


def _unpack(home: Path) -> None:
    scratch = home.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    wanted = [f"{package}/{SUITE}" for package in PACKAGES]
    try:
        subprocess.run(["apt-get", "download", *wanted], cwd=scratch, check=True, capture_output=True)
        for package in scratch.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, scratch], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        have = ".".join(map(str, machines_version()))
        pytest.skip(f"the program needs a newer glibc than {have}, and apt has no {SUITE} on this {platform.system()}")
    scratch.rename(home)
