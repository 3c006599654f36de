"""How many cores this process may use, by CPU affinity and control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def available(root: Path = ROOT, own: Path = OWN) -> int:
    """Number of cores, at least 1; a limit of half a core counts as one.

    Args:
        root: mount point of the control groups.
        own: the file that lists the groups of this process.

    Source: the kernel's documentation of control groups, ``cpu.max`` (v2) and ``cpu.cfs_quota_us`` (v1).
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([n_cores, *(math.ceil(limit) for limit in _limits(root, own))]))


def _limits(root: Path, own: Path) -> list[float]:
    """Limits, in cores, of the process' groups and their parents, as far as they are visible."""
    limits = []
    for line in _read(own).splitlines():
        number, controllers, path = line.split(":", 2)
        is_v2 = number == "0"
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        mounted = root if is_v2 else root / controllers
        below = mounted / path.strip("/")
        for folder in (below, *below.parents):
            if not folder.is_relative_to(mounted):
                break
            limits.append(_limit_v2(folder) if is_v2 else _limit_v1(folder))
    return [limit for limit in limits if limit > 0]


def _limit_v2(folder: Path) -> float:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _limit_v1(folder: Path) -> float:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float:
    """0: no limit."""
    try:
        return max(0.0, int(quota) / int(period))
    except (ValueError, ZeroDivisionError):
        return 0.0


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
