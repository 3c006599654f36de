"""Workers: the option, which one a process is, and how many cores there are for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitserve.server import cores, workers


@pytest.mark.parametrize("arguments", [["--workers", "3"], ["--workers=3"]])
def test_the_option_is_the_setting(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes precedence over the environment, and other arguments are kept."""
    monkeypatch.setenv("PROXY_WORKERS", "2")
    line = ["program", *arguments, "--other"]

    workers.take_option(line, "PROXY_WORKERS")

    assert line == ["program", "--other"]
    assert os.environ["PROXY_WORKERS"] == "3"


def test_a_process_without_workers_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default."""
    monkeypatch.delenv(workers.INDEX_VARIABLE, raising=False)
    assert workers.own_place() == (0, 1)

    monkeypatch.setenv(workers.INDEX_VARIABLE, "2/4")
    assert workers.own_place() == (2, 4)


def test_workers_need_a_port_to_share() -> None:
    """With port 0 each would bind another one."""
    with pytest.raises(SystemExit, match="share a port"):
        workers.check([0, 8001])


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({}, "0::/", 64),
        ({"cpu.max": "max 100000"}, "0::/", 64),
        ({"cpu.max": "200000 100000"}, "0::/", 2),
        ({"cpu.max": "50000 100000"}, "0::/", 1),
        ({"cpu.max": "400000 100000", "pod/cpu.max": "150000 100000", "pod/one/cpu.max": "max 100000"}, "0::/pod/one", 2),
        ({"cpu,cpuacct/pod/cpu.cfs_quota_us": "300000", "cpu,cpuacct/pod/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/pod", 3),
        ({"cpu,cpuacct/pod/cpu.cfs_quota_us": "-1", "cpu,cpuacct/pod/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/pod", 64),
        ({"cpu.max": "nonsense"}, "0::/", 64),
    ],
)
def test_the_limits_of_control_groups_apply(
    files: dict[str, str], own: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest of the process's own group and of all above it; part of a core counts as one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    root = tmp_path / "cgroup"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    (tmp_path / "own").write_text(own + "\n")

    assert cores.available(root, tmp_path / "own") == expected
