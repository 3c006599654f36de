"""A tour of versions: a correct one goes live and back, a wrong one is never released, and no request fails.

    python examples/versions/tour.py --repository ./tour

needs ``pip install "splitserve[publish,cli,proxy,preprocess,predict]"`` and an empty folder. Copy from it what you need.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from splitserve import publish, publish_preprocessor

SPLITSERVE = str(Path(sys.executable).with_name("splitserve"))
PATIENCE_S = 180.0

FLAT = {"district": "centre", "size": 60.0}
"""The row of every request: predict the rent of this flat."""


def flats() -> tuple[pd.DataFrame, np.ndarray]:
    """Districts and sizes (300 rows) and the rents of these flats (300,), which were drawn at random."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "district": random.choice(["south", "north", "centre"], 300).astype(object),
            "size": random.uniform(20, 120, 300).round(),
        }
    )
    dearness = frame["district"].map({"south": 150.0, "north": 250.0, "centre": 700.0})
    return frame, (dearness + 9 * frame["size"] + random.normal(0, 20, 300)).to_numpy()


def transforms(encoder: OneHotEncoder) -> Any:
    """The preprocessor: a column for each district, and the size scaled."""
    return make_column_transformer((encoder, ["district"]), (StandardScaler(), ["size"]), verbose_feature_names_out=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="A tour of versions.")
    parser.add_argument("--repository", type=Path, default=Path("./tour"), help="an empty folder for the model repository")
    repository = parser.parse_args().repository
    if repository.exists() and any(repository.iterdir()):
        sys.exit(f"{repository} is not empty")
    repository.mkdir(parents=True, exist_ok=True)
    rows, rents = flats()

    chapter("1. Version 1 is published and goes live")
    first = make_pipeline(transforms(OneHotEncoder(categories=[["south", "north", "centre"]])), LinearRegression())
    first.fit(rows, rents)
    say("Both halves are published with one call. The author listed the districts by hand: south, north, centre.")
    print(f"\n{publish(first, rows, name='rents', repository=repository)}")
    say("The matrix tries each bundle and the whole of each release on their golden samples, as a service would:")
    splitserve("matrix", "--repository", repository)

    with running(repository) as system, traffic(system) as calls:
        say(f"The system is up. A flat of 60 m² in the centre: {system.ask()[0]:.0f} a month. From now on the same request "
            "is sent continuously. A smoke test of the deployment: do its answers agree with those of training?")  # fmt: skip
        splitserve("verify", system.http, "--repository", repository)

        chapter("2. A preprocessor that would be wrong is refused")
        say("A change to the code: the encoder learns the districts instead, and sorts them: centre, north, south. "
            "The tensors keep their names, datatypes and shapes, so a check of these finds no difference.")  # fmt: skip
        tidied = transforms(OneHotEncoder()).fit(rows)
        print(f"\n{publish_preprocessor(tidied, rows, name='rents', repository=repository).key} is published")
        wrong = first[-1].predict(tidied.transform(pd.DataFrame([FLAT])))[0]
        say(f"With the regression of version 1 the rent would be {wrong:.0f}, without any error. But a preprocessor alone does "
            "not serve: it has to be released together with a predictor, and `release` shows what would change:")  # fmt: skip
        splitserve("release", "rents", "2.1", "--yes", "--repository", repository, status=1)
        splitserve("matrix", "--repository", repository)
        calls.report(expected={"1.1"})

        say("In CI the matrix is a gate: it fails if a route names a pair without a release. An example, in a copy:")
        proposal = copied(repository)
        route = {"pairs": [{"pair": "2.1"}]}
        (proposal / "rents" / "route.json").write_text(json.dumps(route))
        splitserve("matrix", "--repository", proposal, status=1)

        chapter("3. A correct version goes live, and no request fails")
        say("The regression has to be trained on the new features. Both halves are trained and published together, which "
            "releases the pair:")  # fmt: skip
        second = make_pipeline(transforms(OneHotEncoder()), LinearRegression()).fit(rows, rents)
        print(f"\n{publish(second, rows, name='rents', repository=repository)}")
        wait_for(lambda: system.ask()[1] == "3.2", "3.2 to go live")
        splitserve("matrix", "--repository", repository)
        say("Preprocessor 2 is not faulty: with predictor 2 it could be released. Requests that name no version get "
            "the newest release, from now on that of 3.2:")  # fmt: skip
        calls.report(expected={"1.1", "3.2"})
        splitserve("verify", system.grpc, "--repository", repository)

        chapter("4. Back to version 1, and forward again")
        say("Suppose the new rents are in doubt. A rollback records the previous release again; nothing is copied or deleted:")
        splitserve("rollback", "rents", "--repository", repository)
        wait_for(lambda: system.ask()[1] == "1.1", "1.1 to go live again")
        say("The new rents turn out to be correct:")
        splitserve("release", "rents", "3.2", "--yes", "--repository", repository)
        wait_for(lambda: system.ask()[1] == "3.2", "3.2 to go live again")
        splitserve("releases", "rents", "--repository", repository)
        calls.report(expected={"1.1", "3.2"})

        chapter("5. A file in the bucket is damaged")
        file = "rents/predict/2/model.onnx"
        damage(repository, file)
        say(f"One bit of {file} has changed. The matrix detects it before a service loads the file, and stops the deployment:")
        splitserve("matrix", "--repository", repository, status=1)
        say("The running system loaded the file before, and keeps serving:")
        calls.report(expected={"1.1", "3.2"})

    say("After a restart the damaged version is refused, and the newest release that loads serves:")
    with running(repository) as system:
        splitserve("health", "--url", system.grpc)
        rent, pair = system.ask()
        say(f"{pair} serves, and the rent is {rent:.0f}. Once the file is restored, or a version 3 is published, the newest "
            "release serves again.")  # fmt: skip


# Helpers.


def chapter(title: str) -> None:
    print(f"\n{title}\n{'=' * len(title)}")


def say(text: str) -> None:
    print(f"\n{textwrap.fill(text, 100)}", flush=True)


def splitserve(*arguments: object, status: int = 0) -> None:
    """Run a command and show it; ends the tour if its exit status is another one."""
    shown = " ".join(map(str, arguments))
    print(f"\n$ splitserve {shown}", flush=True)
    answer = subprocess.run([SPLITSERVE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(answer.stdout.rstrip(), flush=True)
    print(f"(exit status {answer.returncode})", flush=True)
    if answer.returncode != status:
        sys.exit(f"splitserve {shown}: expected exit status {status}")


def wait_for(claim: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not claim():
        if time.monotonic() > end:
            sys.exit(f"waited for {what}: timed out after {PATIENCE_S:.0f} s")
        time.sleep(0.1)


def copied(repository: Path) -> Path:
    """A copy of the bucket, for experiments."""
    return Path(shutil.copytree(repository, repository.with_name(f"{repository.name}-proposal")))


def damage(repository: Path, name: str) -> None:
    """Flip a bit in the middle of a file, as a failing disk or an interrupted copy does."""
    data = bytearray((repository / name).read_bytes())
    data[len(data) // 2] ^= 1
    (repository / name).write_bytes(data)


class DemoSystem:
    """``splitserve up`` in the background."""

    def __init__(self, http_port: int, grpc_port: int) -> None:
        self.http = f"http://127.0.0.1:{http_port}"
        self.grpc = f"127.0.0.1:{grpc_port}"

    def ask(self) -> tuple[float, str]:
        """The rent of the flat, and the pair that answered."""
        inputs = [
            {"name": "district", "datatype": "BYTES", "shape": [1, 1], "data": [FLAT["district"]]},
            {"name": "size", "datatype": "FP64", "shape": [1, 1], "data": [FLAT["size"]]},
        ]
        answer = self._call("/v2/models/rents/infer", {"inputs": inputs})
        return answer["outputs"][0]["data"][0], answer["model_version"]

    def states(self) -> dict[str, str]:
        """The state of each pair that the system knows."""
        return {entry["version"]: entry["state"] for entry in self._call("/v2/repository/index", {})}

    def is_ready(self) -> bool:
        """Whether the flat's rent can be asked for."""
        try:
            self.ask()
        except (OSError, urllib.error.HTTPError):
            return False
        return True

    def _call(self, path: str, content: object) -> Any:
        with urllib.request.urlopen(self.http + path, json.dumps(content).encode(), timeout=PATIENCE_S) as answer:
            return json.load(answer)


@contextmanager
def running(repository: Path) -> Iterator[DemoSystem]:
    """A running system that serves all versions of the repository; its log is next to the repository."""
    http_port, grpc_port = free_ports(2)
    options = ["--repository", repository, "--http-port", http_port, "--grpc-port", grpc_port, "--admin-port", "off"]
    print(f"\n$ MODEL_VERSIONS=all splitserve up --fused {' '.join(map(str, options))} &")
    with repository.with_name(f"{repository.name}.log").open("a") as log:
        process = subprocess.Popen(
            [SPLITSERVE, "up", "--fused", *map(str, options)],
            env={**os.environ, "MODEL_VERSIONS": "all"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        system = DemoSystem(http_port, grpc_port)
        wait_for(lambda: system.is_ready() or process.poll() is not None, f"the system to come up; {log.name} says more")
        if process.poll() is not None:
            sys.exit(f"the system ended instead of coming up; {log.name} says why")
        yield system
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_S)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Traffic:
    """Callers that send requests continuously, and a count of the answers."""

    def __init__(self, system: DemoSystem) -> None:
        self._system = system
        self._lock = threading.Lock()
        self._rents: dict[str, float] = {}
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self.is_over = False

    def run(self) -> None:
        """Send requests until `is_over`. The answers of a pair must always be equal."""
        while not self.is_over:
            try:
                rent, pair = self._system.ask()
            except (OSError, urllib.error.HTTPError) as error:
                self.failures.append(str(error))
                continue
            with self._lock:
                self.answers[pair] += 1
                if abs(self._rents.setdefault(pair, rent) - rent) > 1e-3:
                    self.failures.append(f"{pair} answered {rent} and {self._rents[pair]}")
            time.sleep(0.02)  # short enough to notice an interruption

    def report(self, expected: set[str]) -> None:
        """Print which pairs have answered; ends the tour if a request failed, or another pair than the expected ones answered."""
        with self._lock:
            answers = ", ".join(f"{count} by {pair}" for pair, count in sorted(self.answers.items()))
            print(f"\nrequests so far: {answers}, {len(self.failures)} failed", flush=True)
            if self.failures or not set(self.answers) <= expected:
                sys.exit(f"expected answers by {expected} only, and no failures: {self.failures[:3]}")


@contextmanager
def traffic(system: DemoSystem, n_callers: int = 2) -> Iterator[Traffic]:
    calls = Traffic(system)
    callers = [threading.Thread(target=calls.run) for _ in range(n_callers)]
    for caller in callers:
        caller.start()
    try:
        yield calls
    finally:
        calls.is_over = True
        for caller in callers:
            caller.join()


if __name__ == "__main__":
    main()
