"""Versions that are published and removed while the system serves."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from splitserve import Client, publish_predictor, publish_preprocessor, release
from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import SplitserveError
from splitserve.oip.protobuf import SERVICE
from tests.budgets import PAUSE_S
from tests.system.models import affine_model
from tests.system.processes import System, wait_until

N_FEATURES = 3
N_SWAPS = 20
N_BALLAST = 1_000_000
"""Floats in each predictor, so that one that is not freed is seen: 4 MB."""

FAST = {"MODEL_VERSIONS": "latest:1", "PREPROCESS_UNLOAD_DELAY_S": "1", "PREDICT_UNLOAD_DELAY_S": "1"}


def publish(repository: Path, number: int) -> None:
    """Both halves as this version: features are multiplied by it, then divided by it, then it is added."""
    rows = np.ones((4, N_FEATURES))
    scaler = StandardScaler(with_mean=False).fit(rows)
    scaler.scale_ = np.full(N_FEATURES, 1 / number)
    publish_preprocessor(scaler, rows, name="m", repository=repository, version=number)
    model = affine_model(N_FEATURES, 1 / number, number, n_ballast=N_BALLAST)
    publish_predictor(model, rows.astype(np.float32), name="m", repository=repository, version=number)
    release("m", f"{number}.{number}", repository=repository, accept_unknown_features=True)


def expected(pair: str) -> float:
    """The answer of a pair for rows of ones; NaN, which equals nothing, for a pair that was never released."""
    preprocessor, predictor = map(int, pair.split("."))
    if preprocessor != predictor:
        return float("nan")
    return preprocessor / predictor + predictor


class Load:
    """Callers that send requests continuously, over REST and gRPC; each answer is compared with that of the named pair."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._stop = threading.Event()
        self.n_answers = 0
        self.complaints: list[str] = []
        self._threads = [threading.Thread(target=target) for target in (self._over_rest, self._over_grpc) * 2]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _check(self, pair: str, values: Any) -> None:
        self.n_answers += 1
        if not np.allclose(values, expected(pair), rtol=1e-5):
            self.complaints.append(f"{pair} answered {values}")

    def _over_rest(self) -> None:
        request = {"inputs": [{"name": "features", "datatype": "FP64", "shape": [1, 3], "data": [1.0, 1.0, 1.0]}]}
        while not self._stop.wait(PAUSE_S):
            status, answer = self._system.rest("/v2/models/m/infer", request)
            if status == 200:
                self._check(answer["model_version"], answer["outputs"][0]["data"])
            else:
                self.complaints.append(str(answer))

    def _over_grpc(self) -> None:
        with Client(self._system.grpc, max_attempts=1) as client:
            while not self._stop.wait(PAUSE_S):
                try:
                    answer = client.infer("m", {"features": np.ones((1, N_FEATURES))}, outputs=["scores"])
                except SplitserveError as error:
                    self.complaints.append(error.message)
                else:
                    self._check(answer.version, answer["scores"])


@contextmanager
def serving(repository: Path, *, is_fused: bool = False, **settings: str) -> Iterator[System]:
    quick = {"PREDICT_REFRESH_INTERVAL_S": "0.1", "PREPROCESS_REFRESH_INTERVAL_S": "0.1"}
    system = System(repository, is_fused=is_fused, **{**FAST, **quick, **settings})
    try:
        yield system.wait_until_settled()
    finally:
        system.stop()


def versions(system: System) -> list[str]:
    return system.rest("/v2/models/m")[1].get("versions", [])


def swap(system: System, repository: Path, n_swaps: int) -> list[dict[str, float]]:
    """Publish versions under load, each when only the previous one is loaded; the MiB of each process afterwards."""
    load = Load(system)
    load.start()
    try:
        sizes = []
        for number in range(2, n_swaps + 2):
            publish(repository, number)
            last_two = [f"{number - 1}.{number - 1}", f"{number}.{number}"]
            wait_until(lambda last_two=last_two: versions(system) == last_two, f"version {number} and the one before it")
            sizes.append({name: process.rss_mb() for name, process in system.processes.items()})
    finally:
        load.stop()

    print(f"{load.n_answers} answers; resident MiB after each swap: {sizes}")
    assert load.complaints == []
    assert load.n_answers > n_swaps
    return sizes


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_swapping_versions_loses_no_request(tmp_path: Path, is_fused: bool) -> None:
    """New versions are loaded while the old ones serve, then replace them."""
    publish(tmp_path, 1)
    with serving(tmp_path, is_fused=is_fused) as system:
        swap(system, tmp_path, n_swaps=3)


@pytest.mark.long
@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_twenty_swaps_in_a_row_lose_no_request_and_no_memory(tmp_path: Path, is_fused: bool) -> None:
    """The old versions are unloaded, and their memory is freed."""
    publish(tmp_path, 1)
    with serving(tmp_path, is_fused=is_fused) as system:
        sizes = swap(system, tmp_path, N_SWAPS)

        ballast_mb = N_BALLAST * 4 / 2**20
        third = N_SWAPS // 3
        for name in system.processes:  # an allocator gives back when it likes to: the middle of a third, not one figure
            before, after = (median(size[name] for size in part) for part in (sizes[:third], sizes[-third:]))
            assert after - before < (N_SWAPS - third) * ballast_mb / 2, sizes


def test_a_bad_new_version_does_not_affect_the_served_one(tmp_path: Path) -> None:
    """The served version keeps serving, and the index gives the reason for the other."""
    publish(tmp_path / "models", 1)
    with serving(tmp_path / "models") as system:
        load = Load(system)
        load.start()
        try:
            elsewhere = copied(tmp_path / "models", tmp_path / "elsewhere")
            model = elsewhere / "predict" / "2" / "model.onnx"
            model.write_bytes(model.read_bytes()[:-1] + b"\xff")
            for part in ("preprocess/2", "predict/2", "releases/0002-2.2"):
                (elsewhere / part).rename(tmp_path / "models" / "m" / part)
            wait_until(lambda: "model.onnx" in index(system).get("m 2.2", ("", ""))[1], "the reason")  # preprocess may poll first
            states = index(system)
        finally:
            load.stop()

        assert load.complaints == []
        assert states["m 1.1"] == ("READY", "")
        assert states["m 2.2"][0] == "UNAVAILABLE"
        assert "m/predict/2: model.onnx: expected sha256" in states["m 2.2"][1]


def copied(repository: Path, to: Path) -> Path:
    """A copy of the repository's model with a second version; its folder."""
    shutil.copytree(repository, to)
    publish(to, 2)
    return to / "m"


def test_a_bundle_copied_file_by_file_is_served_once_it_is_complete(tmp_path: Path) -> None:
    """As cp and rsync copy: half of a file, a file under a temporary name, the manifest first."""
    publish(tmp_path / "models", 1)
    copied(tmp_path / "models", tmp_path / "elsewhere")
    with serving(tmp_path / "models", is_fused=True) as system:
        for part in ("releases/0002-2.2", "preprocess/2", "predict/2"):  # no order is the right one
            source, target = (tmp_path / root / "m" / part for root in ("elsewhere", "models"))
            target.mkdir()
            if "releases" not in part:
                wait_until(lambda: "manifest.json cannot be read" in str(index(system)), "the empty folder seen")
            for file in sorted(source.iterdir(), reverse=True):
                data = file.read_bytes()
                (target / f".{file.name}.part").write_bytes(data[: len(data) // 2])
                (target / f".{file.name}.part").rename(target / file.name)
                with (target / file.name).open("ab") as rest:
                    rest.write(data[len(data) // 2 :])
        wait_until(lambda: "2.2" in versions(system), "the copied version")

        assert index(system)["m 2.2"] == ("READY", "")


def test_a_broken_route_does_not_block_new_versions(tmp_path: Path) -> None:
    """The previous route applies; the index reports the reason, and also a route that names a pair without a release."""
    models = tmp_path / "models"
    publish(models, 1)
    elsewhere = copied(models, tmp_path / "elsewhere")
    route = models / "m" / "route.json"
    with serving(models, MODEL_VERSIONS="latest:1") as system:
        route.write_text('{"pairs": [{"pair": "1.1"}')
        broken = wait_until(lambda: index(system).get("m "), "the report")
        for part in ("preprocess/2", "predict/2", "releases/0002-2.2"):
            shutil.copytree(elsewhere / part, models / "m" / part)
        wait_until(lambda: "2.2" in versions(system), "the new version")
        route.write_text('{"pairs": [{"pair": "7.1"}]}')
        missing = wait_until(lambda: "7.1" in index(system)["m "][1] and index(system)["m "], "the other report")
        status, _ = system.rest("/v2/models/m/versions/7.1/ready")
        route.write_text('{"pairs": [{"pair": "1.1"}]}')
        wait_until(lambda: index(system).get("m ") is None, "the route followed")
        default = system.rest("/v2/models/m")[1]["properties"]["default"]

    assert broken == ("UNAVAILABLE", "m: route.json: Input data was truncated")
    assert missing == ("UNAVAILABLE", 'm: route.json: 7.1 has no release; "splitserve release m 7.1" makes one')
    assert status == 404
    assert default == "1.1"


def index(system: System) -> dict[str, tuple[str, str]]:
    """State and reason by model and version, from REST."""
    _, entries = system.rest("/v2/repository/index", {})
    return {f"{entry['name']} {entry['version']}": (entry["state"], entry.get("reason", "")) for entry in entries}


def call(system: System, method: str, request: Any) -> bytes:
    with grpc.insecure_channel(system.grpc) as channel:
        answer: bytes = channel.unary_unary(f"/{SERVICE}/{method}")(request.SerializeToString())
        return answer


def index_over_grpc(system: System) -> Any:
    return pb.RepositoryIndexResponse.FromString(call(system, "RepositoryIndex", pb.RepositoryIndexRequest())).models


def test_reload_and_repository_control_act_at_once(tmp_path: Path) -> None:
    """With polling practically disabled: the command, and load and unload for operators, over REST and gRPC."""
    command = Path(sys.executable).with_name("splitserve")
    publish(tmp_path, 1)
    slow = {"PREDICT_REFRESH_INTERVAL_S": "3600"}
    with serving(tmp_path, ALLOW_REPOSITORY_CONTROL="true", **slow) as system:
        publish(tmp_path, 2)

        reloaded = subprocess.run([command, "reload", "m", "--url", system.grpc], check=True, capture_output=True, text=True)
        after_reload = versions(system)
        unloaded, _ = system.rest("/v2/repository/models/m/unload", {})
        status, answer = system.rest("/v2/models/m/ready")
        loaded, _ = system.rest("/v2/repository/models/m/load", {})
        ready_again, _ = system.rest("/v2/models/m/ready")

        call(system, "RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="m"))
        states_unloaded = {state.state for state in index_over_grpc(system)}
        call(system, "RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="m"))
        states_loaded = {state.version: state.state for state in index_over_grpc(system)}

        assert reloaded.stdout == "reloaded m\n"
        assert "2.2" in after_reload
        assert (unloaded, status, loaded) == (200, 503, 200)
        assert "it was unloaded" in answer["error"] or "no preprocessor" in answer["error"]
        assert ready_again == 200
        assert states_unloaded == {"UNAVAILABLE"}
        assert states_loaded["2.2"] == "READY"
