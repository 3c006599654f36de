"""Batch scoring beside ``mlserver infer`` and ``mlflow models predict``: the same rows and pipeline, each in its environment.

Whole commands on the same cores, with their start; MLServer's server is started before and not counted. MLServer reads a request
of one row a line, as its documentation has it, in micro-batches; MLflow reads CSV.
"""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import joblib
import msgspec
import pandas as pd

from benchmarks.processes import BenchmarkError, free_port
from benchmarks.venvs import python_of
from training.demo import DEMOS

MODEL = "breast-cancer"
MICRO_BATCH = 512
START_TIMEOUT_S = 120.0

Run = Callable[[Sequence[str]], float]
"""The seconds that a command took."""


def compare(rows: pd.DataFrame, ours: Callable[[Path], Sequence[str]], run: Run, scratch: Path) -> dict[str, float]:
    """Seconds by command.

    Args:
        rows: of the model breast-cancer, 30 columns.
        ours: the command that scores a file of them.
        run: runs a command and takes its time.
        scratch: a folder for files.
    """
    csv = scratch / "peers.csv"
    rows.to_csv(csv, index=False)
    pipeline, _ = DEMOS[MODEL][0]()
    joblib.dump(pipeline, scratch / "pipeline.joblib")
    return {
        "splitserve batch": run(ours(csv)),
        "mlserver infer": _mlserver(rows, run, scratch),
        "mlflow models predict": _mlflow(csv, run, scratch),
    }


def _mlserver(rows: pd.DataFrame, run: Run, scratch: Path) -> float:
    requests = scratch / "requests.jsonl"
    with requests.open("wb") as file:
        for row in rows.to_numpy():
            tensor = {"name": "features", "shape": [1, len(row)], "datatype": "FP64", "data": row.tolist()}
            file.write(msgspec.json.encode({"inputs": [tensor]}) + b"\n")
    mlserver = str(Path(python_of("mlserver")).with_name("mlserver"))
    with _server(mlserver, scratch) as address:
        command = (mlserver, "infer", "--url", address, "--model-name", MODEL, "--input-data-path", str(requests))
        return run((*command, "--output-data-path", str(scratch / "answers.jsonl"), "--batch-size", str(MICRO_BATCH)))


@contextmanager
def _server(mlserver: str, scratch: Path) -> Iterator[str]:
    folder = scratch / "mlserver"
    folder.mkdir()
    ports = {name: free_port() for name in ("http_port", "grpc_port", "metrics_port")}
    (folder / "settings.json").write_bytes(msgspec.json.encode({"host": "127.0.0.1", "parallel_workers": 0, **ports}))
    parameters = {"uri": str(scratch / "pipeline.joblib")}
    settings = {"name": MODEL, "implementation": "mlserver_sklearn.SKLearnModel", "parameters": parameters}
    (folder / "model-settings.json").write_bytes(msgspec.json.encode(settings))
    address = f"127.0.0.1:{ports['http_port']}"
    with (folder / "log").open("w") as log, subprocess.Popen([mlserver, "start", folder], stdout=log, stderr=log) as process:
        try:
            _wait(f"http://{address}/v2/models/{MODEL}/ready", process)
            yield address
        finally:
            process.terminate()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise BenchmarkError(f"MLServer did not become ready at {url}")


_SAVE = """
import sys, joblib, mlflow.sklearn
pipeline = joblib.load(sys.argv[1])
mlflow.sklearn.save_model(pipeline, sys.argv[2], pyfunc_predict_fn="predict_proba", serialization_format="cloudpickle")
"""


def _mlflow(csv: Path, run: Run, scratch: Path) -> float:
    python = python_of("mlflow")
    saved = scratch / "mlflow-model"
    subprocess.run([python, "-c", _SAVE, scratch / "pipeline.joblib", saved], check=True, capture_output=True)
    command = (str(Path(python).with_name("mlflow")), "models", "predict", "--model-uri", str(saved), "--input-path", str(csv))
    return run((*command, "--content-type", "csv", "--output-path", str(scratch / "answers.json"), "--env-manager", "local"))
