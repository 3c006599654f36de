"""Pipelines whose store is on a disk that is full, or cannot be written.

``python -m tests.pipeline.small_disk FOLDER`` prints what happened as JSON on its last line. The disks are tmpfs, so the process
has to be allowed to mount, and has a mount namespace of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from splitserve.pipeline.commands import main
from splitserve.pipeline.index import Index
from tests.pipeline import tiny

MIB = 1024**2
ROOM_MIB = 24
"""For MLflow's empty database and what SQLite needs beside it."""

WRITES = {
    "an output": "(context.outputs / 'large').write_bytes(bytes({size}))",
    "a checkpoint": "context.checkpoints.save(1, bytes({size}))",
    "an upload": "(context.outputs / 'large').write_bytes(bytes({size} * 3 // 5))",
}


def mount(folder: Path, options: str, *, kind: str = "tmpfs") -> None:
    subprocess.run(["mount", "-t", kind, "-o", options, "none", folder], check=True)


def outcome(package: Path, *arguments: str) -> dict[str, Any]:
    """The exit code of a run, and what is recorded then."""
    index = Index(package.parent / "store", "tiny")
    before = {run.id for run in index.runs()}
    code = main(tiny.pipeline(package), ["run", *arguments])
    return {
        "code": code,
        "steps": {step.step: step.state for run in index.runs() if run.id not in before for step in run.steps},
        "finished": [step for step in ("data", "train", "evaluate") if index.last(step) is not None],
        "attempts": [path.name for path in (package.parent / "store" / "attempts").glob("*")],
    }


def statuses(store: Path) -> dict[str, str]:
    """Statuses of MLflow's newest runs, by name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    return {run.info.run_name: run.info.status for run in reversed(found)}


def full(package: Path, store: Path, scenario: str) -> list[Any]:
    """The data step writes more than there is room for; then there is more room."""
    mount(store, f"size={ROOM_MIB}m")
    data = package / "data.py"
    data.write_text(f"{data.read_text()}    {WRITES[scenario].format(size=ROOM_MIB * MIB)}\n")
    database(store)
    first = outcome(package)
    first["mlflow"] = statuses(store)
    mount(store, f"remount,size={8 * ROOM_MIB}m")
    return [first, outcome(package, "--until=data")]


def read_only_artifacts(package: Path, store: Path) -> list[Any]:
    """MLflow's database can be written, its artifacts cannot; then they can."""
    artifacts = store / "artifacts"
    artifacts.mkdir()
    mount(artifacts, "size=24m,ro")
    database(store)
    first = outcome(package)
    first["mlflow"] = statuses(store)
    mount(artifacts, "remount,rw")
    return [first, outcome(package, "--until=data")]


def read_only_store(package: Path, store: Path) -> list[Any]:
    """Nothing can be written; then it can."""
    mount(store, "size=24m,ro")
    first = {"code": main(tiny.pipeline(package), ["run"])}
    mount(store, "remount,rw")
    database(store)
    return [first, outcome(package, "--until=data")]


def database(store: Path) -> None:
    """MLflow's empty database: its tables take seconds to make."""
    shutil.copyfile(Path(sys.argv[1], "mlflow.db"), store / "mlflow.db")


def run_all(folder: Path) -> dict[str, Any]:
    """Outcomes before and after there is room, and the errors that were printed, by scenario."""
    from mlflow.tracking import MlflowClient

    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    found = {}
    for scenario in (*WRITES, "read-only artifacts", "a read-only store"):
        package, errors = tiny.write(folder / scenario), io.StringIO()
        store = package.parent / "store"
        store.mkdir()
        with contextlib.redirect_stderr(errors):
            if scenario in WRITES:
                outcomes = full(package, store, scenario)
            else:
                outcomes = (read_only_artifacts if "artifacts" in scenario else read_only_store)(package, store)
        found[scenario] = [*outcomes, errors.getvalue()]
    return found


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]))))
