"""The recipes for nightly runs in docs/batch.md do what they say, as far as this is known without cron and Kubernetes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "batch.md").read_text()
DAY = "2026-01-31"

FIELDS: dict[str, set[str]] = {
    "CronJob": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"schedule", "concurrencyPolicy", "jobTemplate"},
    "job": {"backoffLimit", "podFailurePolicy", "template"},
    "pod": {"restartPolicy", "containers", "volumes"},
    "container": {"name", "image", "command", "env", "volumeMounts"},
}
"""Of batch/v1. Source: Kubernetes API reference, CronJob, JobSpec, PodSpec, Container."""


def block_of(call: str) -> str:
    """The block of the page that has this text."""
    (found,) = [block for block in re.findall(r"^```\w*\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if call in block]
    return str(found)


def called(shell_command: str, folder: Path) -> list[str]:
    """What a shell gives to ``splitserve`` on a known day."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "splitserve").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$FOUND"\n')
    (programs / "date").write_text(f'#!/bin/sh\n[ "$*" = +%F ] && echo {DAY}\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "FOUND": str(folder / "found")}
    subprocess.run(["sh", "-c", shell_command], cwd=folder, env=environment, check=True)
    return (folder / "found").read_text().splitlines()


def is_each_night(schedule: str) -> bool:
    minute, hour, *rest = schedule.split()
    return int(minute) in range(60) and int(hour) in range(24) and rest == ["*", "*", "*"]


@pytest.mark.heavy
def test_the_line_for_cron_scores_the_day(tmp_path: Path) -> None:
    """Cron ends a command at a percent sign that has no backslash, and removes the backslashes."""
    line = block_of("cd /srv/scoring")
    match = re.fullmatch(r"((?:\S+ ){5})(.*)\n", line)
    assert match is not None
    schedule, command = match.groups()
    assert is_each_night(schedule)
    assert not re.search(r"(?<!\\)%", command)

    arguments = called(command.replace("\\%", "%").replace("/srv/scoring", str(tmp_path)), tmp_path)

    assert arguments == ["batch", "penguins", f"in/{DAY}.parquet", f"out/{DAY}.parquet", "--keep", "id", "--json"]
    assert (tmp_path / "runs.jsonl").exists()


@pytest.mark.heavy
def test_the_cron_job_of_kubernetes_scores_the_day(tmp_path: Path) -> None:
    """Its fields are those of the API, its volume is mounted where its command reads and writes."""
    found: dict[str, Any] = yaml.safe_load(block_of("kind: CronJob"))
    spec = found["spec"]
    job = spec["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]

    for name, each in {"CronJob": found, "spec": spec, "job": job, "pod": pod, "container": container}.items():
        assert set(each) <= FIELDS[name]
    assert (found["apiVersion"], found["kind"]) == ("batch/v1", "CronJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", found["metadata"]["name"])
    assert is_each_night(spec["schedule"])
    assert spec["concurrencyPolicy"] == "Forbid"
    assert pod["restartPolicy"] == "Never", "podFailurePolicy takes no other"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3]}}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (mount,) = container["volumeMounts"]
    assert container["command"][:2] == ["sh", "-c"]

    arguments = called(container["command"][2], tmp_path)

    data = mount["mountPath"]
    assert arguments == ["batch", "penguins", f"{data}/in/{DAY}.parquet", f"{data}/out/{DAY}.parquet", "--keep", "id", "--json"]
    (repository,) = [each["value"] for each in container["env"] if each["name"] == "MODEL_REPOSITORY"]
    assert repository.startswith(f"{data}/")
