"""Ray, Spark and Dask, each for real: killed, resumed in a session of its own, and with people's own functions.

The engines have an environment of their own, with the package's versions of everything else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.csv
import pytest

import splitserve
from tests.demo_models import Demos
from tests.system.processes import wait_until

ROOT = Path(__file__).parents[3]
BIN = ROOT / ".venv-engines" / "bin"
N_SHARDS = 16

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def rows(demos: Demos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a shard of 2,000 penguins, one of them bad, with times that fall into hours that clocks skip."""
    frame = pd.concat([demos.models["penguins"].rows] * 6, ignore_index=True).iloc[:2_000]
    folder = tmp_path_factory.mktemp("rows")
    for number in range(N_SHARDS):
        part = frame.assign(id=range(number * len(frame), (number + 1) * len(frame)))
        part["at"] = pd.Timestamp("2026-03-08T01:30") + pd.to_timedelta(part["id"], unit="min")
        part.loc[number, "bill_depth_mm"] = np.inf
        (folder / f"day={number:02d}").mkdir()
        part.to_parquet(folder / f"day={number:02d}" / "rows.parquet", index=False)
    return folder


@pytest.fixture(scope="module")
def expected(demos: Demos, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the local engine writes."""
    output = tmp_path_factory.mktemp("expected") / "scores.csv"
    splitserve.score("penguins", rows, output, repository=demos.repository, keep=["id", "at"])
    return output


@pytest.fixture(scope="module")
def broken(demos: Demos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose predictor is not what was released."""
    repository = tmp_path_factory.mktemp("broken") / "models"
    shutil.copytree(demos.repository / "penguins", repository / "penguins")
    model = repository / "penguins" / "predict" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    return repository


def example_of(call: str) -> str:
    """The example of docs/batch.md that has a call."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "batch.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if call in block]
    return found


EXAMPLES = {"ray": ".map_batches(", "spark": ".mapInArrow(", "dask": ""}


@pytest.mark.parametrize("engine", EXAMPLES)
def test_a_killed_run_is_resumed_with_equal_bytes(
    demos: Demos, rows: Path, expected: Path, broken: Path, tmp_path: Path, engine: str
) -> None:
    """kill -9 when the first shard is finished: nothing of the engine remains, and a session of the user's own goes on.

    There, workers refuse a release that was changed, and the examples of docs/batch.md give the same answers. Nothing depends on
    the machine's time zone.
    """
    output, found = tmp_path / "scores.csv", tmp_path / "found.json"
    run = uuid.uuid4().hex
    environment = os.environ | {
        "ENGINES_TEST": run,
        "TZ": "America/New_York",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYSPARK_PYTHON": str(BIN / "python"),
        "MODEL_REPOSITORY": str(demos.repository),
        "ROWS": str(rows),
        "OUTPUT": str(output),
        "BROKEN": str(broken),
        "FOUND": str(found),
    }
    records = tmp_path / "scores.csv.parts" / "_splitserve" / "shards"

    command = [BIN / "splitserve", "batch", "penguins", rows, output, "--keep", "id,at", "--engine", engine, "--workers", "2"]
    with subprocess.Popen(command, env=environment) as process:
        wait_until(
            lambda: output.exists() or process.poll() is not None or any(records.glob("part-*.json")),
            "a finished shard",
            patience_s=200,
        )
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not remaining(run), "the engine's processes to end", patience_s=60)
    n_finished = len(list(records.glob("part-*.json")))
    example = example_of(EXAMPLES[engine]) if EXAMPLES[engine] else ""
    subprocess.run(
        [BIN / "python", Path(__file__).with_name("session.py"), engine],
        input=example,
        text=True,
        env=environment,
        cwd=rows,
        check=True,
    )

    facts: dict[str, Any] = json.loads(found.read_text())
    assert output.read_bytes() == expected.read_bytes()
    assert output.with_suffix(".errors.jsonl").read_bytes() == expected.with_suffix(".errors.jsonl").read_bytes()
    assert facts["resumed"] == n_finished or output.exists()
    assert n_finished >= 1
    assert "penguins/predict/1: model.onnx: " in facts["broken"]
    if example:
        answers = pyarrow.csv.read_csv(expected)
        labels = dict(zip(answers["id"].to_pylist(), answers["label"].to_pylist(), strict=True))
        assert facts["example"] == {"rows": N_SHARDS * 2_000, "errors": N_SHARDS, "label_of_5": labels[5]}


def remaining(run: str) -> list[str]:
    """Processes that have a run's mark in their environment; without Ray's agents, which score nothing and end after a minute."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().replace("\0", " ")
            if run.encode() in (process / "environ").read_bytes() and "Agent" not in command:
                found.append(command)
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.mark.parametrize("engine", EXAMPLES)
def test_an_engine_without_its_package_names_the_extra(demos: Demos, rows: Path, tmp_path: Path, engine: str) -> None:
    """The development environment has none of them."""
    with pytest.raises(splitserve.scoring.ScoringError, match=rf'pip install "splitserve\[batch-{engine}\]"'):
        splitserve.score("penguins", rows, tmp_path / "scores.csv", repository=demos.repository, engine=engine)
