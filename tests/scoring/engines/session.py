"""Run in the environment of the engines: ``session.py ENGINE``, with paths in the environment.

Starts a session as people do, goes on with a run in it, and runs the example of docs/batch.md that it gets on standard input.
What it finds goes to the file FOUND.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import splitserve
from splitserve.scoring import ScoringError

N_WORKERS = 2


@contextmanager
def session(engine: str) -> Iterator[dict[str, str]]:
    """The variables by which other programs find what was started; none if they cannot."""
    if engine == "ray":
        import ray

        ray.init(num_cpus=N_WORKERS, include_dashboard=False)
        yield {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        ray.shutdown()
    elif engine == "spark":
        from pyspark.sql import SparkSession

        spark = SparkSession.builder.master(f"local[{N_WORKERS}]").config("spark.ui.enabled", "false").getOrCreate()
        yield {}
        spark.stop()
    else:
        from distributed import Client, LocalCluster

        with LocalCluster(n_workers=N_WORKERS, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
            yield {"DASK_SCHEDULER_ADDRESS": cluster.scheduler_address}


def main(engine: str) -> None:
    rows, output, broken = (os.environ[name] for name in ("ROWS", "OUTPUT", "BROKEN"))
    found: dict[str, object] = {}
    with session(engine) as address:
        try:
            splitserve.score("penguins", rows, f"{output}.broken.csv", repository=broken, engine=engine)
        except ScoringError as error:
            found["broken"] = str(error)
        if address:
            command = [Path(sys.executable).with_name("splitserve"), "batch", "penguins", rows, output, "--keep", "id,at"]
            done = subprocess.run(
                [*command, "--engine", engine, "--json"], env=os.environ | address, stdout=subprocess.PIPE, check=True
            )
            found["resumed"] = json.loads(done.stdout)["resumed_shards"]
        else:
            models = os.environ["MODEL_REPOSITORY"]
            summary = splitserve.score("penguins", rows, output, repository=models, keep=["id", "at"], engine=engine)
            found["resumed"] = summary.resumed_shards
        if example := sys.stdin.read():
            names: dict[str, object] = {}
            exec(compile(example, "docs/batch.md", "exec"), names)
            found["example"] = names["found"]
    Path(os.environ["FOUND"]).write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main(sys.argv[1])
