"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

PACKAGES = ("grpcio", "uvloop", "httptools", "msgspec", "numpy", "scikit-learn", "onnxruntime", "protobuf")


class Machine(msgspec.Struct, frozen=True):
    """Where and with what something was measured. ``load_average`` is that of the minute before."""

    cpu: str
    n_cores: int
    memory_gb: float
    kernel: str
    python: str
    """Version, compiler, and whether profiles guided the build: without, the interpreter takes a fifth to a third longer."""

    commit: str
    time: str
    load_average: float
    versions: dict[str, str]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"{self.cpu}, {self.n_cores} cores, {self.memory_gb:.0f} GB, {self.kernel}; CPython {self.python}, {versions}; "
            f"commit {self.commit}, {self.time}; load average before: {self.load_average:.2f}"
        )


def this_machine() -> Machine:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu=_cpu(),
        n_cores=len(os.sched_getaffinity(0)),
        memory_gb=memory / 1e9,
        kernel=f"{platform.system()} {platform.release()}",
        python=python_build(),
        commit=_commit(),
        time=datetime.now(UTC).isoformat(timespec="minutes"),
        load_average=os.getloadavg()[0],
        versions={name: version(name) for name in PACKAGES},
    )


def python_build() -> str:
    """The interpreter's version, compiler, and optimisations. Source: CPython, "Configure Python", --enable-optimizations."""
    options = sysconfig.get_config_var("CONFIG_ARGS") or ""
    kinds = [name for name, option in (("PGO", "--enable-optimizations"), ("LTO", "--with-lto")) if option in options]
    built = " and ".join(kinds) if kinds else "no PGO, no LTO"
    return f"{platform.python_version()} ({platform.python_compiler()}, {built})"


def _cpu() -> str:
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    described = subprocess.run([git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"
