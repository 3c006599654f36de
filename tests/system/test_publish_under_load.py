"""Pipelines published one after the other while clients call: no answer comes from a mixed pair, and no request is lost."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from splitserve import Client, publish
from splitserve.errors import SplitserveError
from splitserve.publishing.from_bundles import rollback, withdraw
from tests.budgets import PAUSE_S
from tests.system.processes import Process, System, free_ports, wait_until

ROWS = np.random.default_rng(0).normal(loc=5, size=(40, 3))
TARGETS = ROWS @ [1.0, 2.0, 3.0] + 1000
ROW = ROWS[:1]

RELATIVE = 1e-4
"""A mixture of two publishes is off by a tenth or more."""


def pipeline(number: int) -> Pipeline:
    """Each is fitted on other data and scales differently than the previous one: every mixed pair fits, and is wrong."""
    scaler = StandardScaler() if number % 2 else MinMaxScaler()
    return make_pipeline(scaler, Ridge(alpha=1e-3)).fit(ROWS * (1 + number / 10), TARGETS * number)


class Callers:
    """Threads that call without naming a version; each answer is compared with the release that it names."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._stop = threading.Event()
        self.truths: dict[str, float] = {}
        self.n_answers = 0
        self.releases: set[str] = set()
        self.complaints: list[str] = []
        self._threads = [threading.Thread(target=target) for target in (self._over_rest, self._over_grpc) * 2]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _check(self, release: str, value: Any) -> None:
        self.n_answers += 1
        self.releases.add(release)
        truth = self.truths.get(release)
        if truth is None or not np.allclose(np.ravel(value), truth, rtol=RELATIVE):
            self.complaints.append(f"{release} answered {value}, its pipeline {truth}")

    def _over_rest(self) -> None:
        request = {"inputs": [{"name": "features", "datatype": "FP64", "shape": [1, 3], "data": ROW.ravel().tolist()}]}
        while not self._stop.wait(PAUSE_S):
            status, answer = self._system.rest("/v2/models/m/infer", request)
            if status == 200:
                self._check(answer["model_version"], answer["outputs"][0]["data"])
            else:
                self.complaints.append(f"{status} {answer}")

    def _over_grpc(self) -> None:
        with Client(self._system.grpc, max_attempts=1) as client:
            while not self._stop.wait(PAUSE_S):
                try:
                    answer = client.infer("m", {"features": ROW})
                except SplitserveError as error:
                    self.complaints.append(error.message)
                else:
                    self._check(answer.version, next(iter(answer.values())))


class Replicated(System):
    """Two processes of preprocess and of predict each, which poll at their own times."""

    def __init__(self, models: Path) -> None:
        self._environment = {"MODEL_REPOSITORY": str(models)}
        predict, preprocess = free_ports(2)
        self.processes = {
            "predict": Process("predict_service", self._of("PREDICT", predict, 0.3), arguments=["--workers", "2"]),
            "preprocess": Process(
                "preprocess_service",
                {**self._of("PREPROCESS", preprocess, 0.2), "PREPROCESS_PREDICT_TARGET": f"127.0.0.1:{predict}"},
                arguments=["--workers", "2"],
            ),
        }
        self._start_edge("proxy", "proxy", PROXY_PREPROCESS_TARGET=f"127.0.0.1:{preprocess}")

    def _of(self, prefix: str, port: int, refresh_s: float) -> dict[str, str]:
        return {**self._environment, f"{prefix}_GRPC_PORT": str(port), f"{prefix}_REFRESH_INTERVAL_S": str(refresh_s)}


def publish_under_load(tmp_path: Path, n_publishes: int, *, is_fused: bool, interval_s: float, n_answers: int = 100) -> Callers:
    """Publish repeatedly, and wait until the last release serves and at least ``n_answers`` have come."""
    first = pipeline(1)
    publish(first, ROWS, name="m", repository=tmp_path)
    quick = {"PREDICT_REFRESH_INTERVAL_S": "0.1", "PREPROCESS_REFRESH_INTERVAL_S": "0.1"}
    system = System(tmp_path, is_fused=True, **quick) if is_fused else Replicated(tmp_path)
    try:
        wait_until(lambda: system.rest("/v2/models/m/ready")[0] == 200, "the first release")
        callers = Callers(system)
        callers.truths["1.1"] = float(first.predict(ROW)[0])
        with callers:
            for number in range(2, n_publishes + 2):
                began, made = time.monotonic(), pipeline(number)
                callers.truths[f"{number}.{number}"] = float(made.predict(ROW)[0])
                publish(made, ROWS, name="m", repository=tmp_path)
                threading.Event().wait(max(0.0, interval_s - (time.monotonic() - began)))
            last = f"{n_publishes + 1}.{n_publishes + 1}"
            wait_until(lambda: last in callers.releases, f"answers of {last}")
            wait_until(lambda: callers.n_answers >= n_answers, f"{n_answers} answers")
    finally:
        system.stop()
    return callers


@pytest.mark.parametrize("is_fused", [False, True], ids=["replicas", "fused"])
def test_every_answer_is_that_of_the_release_that_it_names(tmp_path: Path, is_fused: bool) -> None:
    """While versions are published as fast as they can be, with replicas that poll out of phase."""
    callers = publish_under_load(tmp_path, 4, is_fused=is_fused, interval_s=0)

    assert callers.complaints == []


@pytest.mark.long
@pytest.mark.parametrize("is_fused", [False, True], ids=["replicas", "fused"])
def test_twenty_publishes_a_second_apart_lose_nothing(tmp_path: Path, is_fused: bool) -> None:
    """Ten thousand requests, each answer compared."""
    callers = publish_under_load(tmp_path, 20, is_fused=is_fused, interval_s=1, n_answers=10_000)

    print(f"{callers.n_answers} answers of {len(callers.releases)} releases")
    assert callers.complaints == []


@pytest.mark.parametrize("is_fused", [False, True], ids=["replicas", "fused"])
def test_a_release_that_is_rolled_back_or_withdrawn_under_load_loses_no_request(tmp_path: Path, is_fused: bool) -> None:
    """Requests without a version are bound to the previous release; those that were bound to this one are answered."""
    made = {f"{number}.{number}": pipeline(number) for number in (1, 2, 3)}
    for each in made.values():
        publish(each, ROWS, name="m", repository=tmp_path)
    quick = {"PREDICT_REFRESH_INTERVAL_S": "0.1", "PREPROCESS_REFRESH_INTERVAL_S": "0.1"}
    system = System(tmp_path, is_fused=True, **quick) if is_fused else Replicated(tmp_path)

    def default() -> Any:
        return system.rest("/v2/models/m")[1].get("properties", {}).get("default")

    try:
        wait_until(lambda: default() == "3.3", "the newest release")
        callers = Callers(system)
        callers.truths = {pair: float(each.predict(ROW)[0]) for pair, each in made.items()}
        with callers:
            rollback("m", repository=tmp_path)
            wait_until(lambda: default() == "2.2", "the release before it")
            withdraw("m", 2, repository=tmp_path)
            withdraw("m", 4, repository=tmp_path)
            wait_until(lambda: default() == "3.3", "the one that is left and newer")
            # The default follows the first replica without the withdrawn pair; another may still list it until its next poll.
            wait_until(lambda: "2.2" not in system.rest("/v2/models/m")[1]["versions"], "the withdrawn pair to leave the list")
            with Client(system.grpc) as client:
                still = client.infer("m", {"features": ROW}, version="2.2")
    finally:
        system.stop()

    assert callers.complaints == []
    np.testing.assert_allclose(np.ravel(next(iter(still.values()))), callers.truths["2.2"], rtol=RELATIVE)


def serve_while_unmounted(tmp_path: Path, is_gone: str, *, is_fused: bool, for_s: float) -> tuple[Callers, str]:
    """Move the repository away under load and back again; the callers, and why the model was not loaded from it meanwhile."""
    models, away = tmp_path / "models", tmp_path / "away"
    first = pipeline(1)
    publish(first, ROWS, name="m", repository=models)
    quick = {"PREDICT_REFRESH_INTERVAL_S": "0.1", "PREPROCESS_REFRESH_INTERVAL_S": "0.1", "PREPROCESS_UNLOAD_DELAY_S": "0.2"}
    system = System(models, is_fused=True, PREDICT_UNLOAD_DELAY_S="0.2", **quick) if is_fused else Replicated(models)

    def reason() -> str:
        return str(system.rest("/v2/repository/index", {})[1][0]["reason"])

    try:
        wait_until(lambda: system.rest("/v2/models/m/ready")[0] == 200, "the first release")
        callers = Callers(system)
        callers.truths["1.1"] = float(first.predict(ROW)[0])
        with callers:
            source, target = (models, away) if is_gone == "root" else (models / "m", away)
            source.rename(target)
            gone = wait_until(reason, "the reason")
            n_answers = callers.n_answers
            threading.Event().wait(for_s)
            wait_until(lambda: callers.n_answers > n_answers + 200, "answers meanwhile")
            target.rename(source)
            wait_until(lambda: not reason(), "the repository read again")
    finally:
        system.stop()
    return callers, gone


@pytest.mark.parametrize("is_gone", ["root", "contents"])
def test_a_repository_that_is_unmounted_under_load_loses_no_request(tmp_path: Path, is_gone: str) -> None:
    """Absence is not withdrawal: what was loaded serves on and says why, until the repository can be read again."""
    callers, gone = serve_while_unmounted(tmp_path, is_gone, is_fused=True, for_s=0)

    assert callers.complaints == []
    assert "no such folder" in gone or "are no longer in the repository" in gone


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_gone", ["root", "contents"])
@pytest.mark.parametrize("is_fused", [False, True], ids=["replicas", "fused"])
def test_a_repository_that_is_unmounted_for_a_minute_loses_no_request(tmp_path: Path, is_gone: str, is_fused: bool) -> None:
    """Longer than any delay and grace."""
    callers, _ = serve_while_unmounted(tmp_path, is_gone, is_fused=is_fused, for_s=60)

    print(f"{callers.n_answers} answers")
    assert callers.complaints == []
    assert callers.n_answers > 2000


class Rolled(System):
    """Three replicas of preprocess and of predict, each at an address of its own, whose images have their own repositories."""

    ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")

    def __init__(self, models: Path) -> None:
        self._environment = {}
        self._ports = dict(zip(("predict", "preprocess"), free_ports(2), strict=True))
        self.processes = {}
        for service in self._ports:
            for number in range(len(self.ADDRESSES)):
                self.start(service, number, models)
        named = self._named("preprocess")
        target = {"PROXY_PREPROCESS_TARGET": f"preprocess.test:{self._ports['preprocess']}"}
        settings = {"PROXY_HTTP_PORT": "0", "PROXY_GRPC_PORT": "0", "PROXY_REFRESH_INTERVAL_S": "0.5"}
        self.processes["proxy"] = Process("tests.system.named", {**settings, **target}, arguments=["proxy", named])
        ports = self.processes["proxy"].wait_for("listening")
        self.http, self.grpc = (f"127.0.0.1:{ports[name]}" for name in ("http_port", "grpc_port"))

    def _named(self, service: str) -> str:
        return f"{service}.test={','.join(self.ADDRESSES)}"

    def start(self, service: str, number: int, models: Path) -> None:
        """Start a replica with the models of its image, and wait until it is ready."""
        prefix = service.upper()
        settings = {
            "MODEL_REPOSITORY": str(models),
            f"{prefix}_HOST": self.ADDRESSES[number],
            f"{prefix}_GRPC_PORT": str(self._ports[service]),
            f"{prefix}_DRAIN_DELAY_S": "1",
            "PREPROCESS_PREDICT_TARGET": f"predict.test:{self._ports['predict']}",
        }
        arguments = [f"{service}_service", self._named("predict")]
        self.processes[f"{service} {number}"] = process = Process("tests.system.named", settings, arguments=arguments)
        process.wait_for("ready")

    def replace(self, service: str, number: int, models: Path) -> None:
        """Stop a replica and start it with another image."""
        assert self.processes[f"{service} {number}"].stop() == 0
        self.start(service, number, models)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_images_that_are_rolled_forward_and_back_one_by_one_lose_no_request(tmp_path: Path) -> None:
    """Each image has its models inside: the old one two releases, the new one a third. A replica at a time, half by half."""
    old, new = tmp_path / "old", tmp_path / "new"
    made = {f"{number}.{number}": pipeline(number) for number in (1, 2, 3)}
    for number, each in enumerate(made.values(), start=1):
        publish(each, ROWS, name="m", repository=new)
        if number == 2:
            shutil.copytree(new, old)
    system = Rolled(old)
    try:
        wait_until(lambda: system.rest("/v2/models/m/ready")[0] == 200, "ready")
        callers = Callers(system)
        callers.truths = {pair: float(each.predict(ROW)[0]) for pair, each in made.items()}
        with callers:
            for models, last in ((new, "3.3"), (old, "2.2")):
                for number in range(len(system.ADDRESSES)):
                    for service in ("predict", "preprocess"):
                        system.replace(service, number, models)
                default = lambda: system.rest("/v2/models/m")[1].get("properties", {}).get("default")  # noqa: E731
                wait_until(lambda: default() == last, f"{last} as the default")  # noqa: B023
    finally:
        system.stop()

    print(f"{callers.n_answers} answers of {sorted(callers.releases)}")
    assert callers.complaints == []
    assert callers.releases == {"2.2", "3.3"}
    assert callers.n_answers > 2000
