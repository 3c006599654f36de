"""What a running system refuses to serve, and how it says so."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import joblib
import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder

from splitserve import publish, publish_predictor, publish_preprocessor, release
from splitserve.api.inference import inference_pb2 as pb
from splitserve.oip import protobuf
from tests.command_line import run_command
from tests.signing_keys import make_keys
from tests.system.models import affine_model
from tests.system.processes import UNRELEASED, System, wait_until

COMMAND = Path(sys.executable).with_name("splitserve")
ROWS = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


@contextmanager
def serving(repository: Path, *, is_fused: bool = True, **settings: str) -> Iterator[System]:
    quick = {"PREDICT_REFRESH_INTERVAL_S": "0.1", "PREPROCESS_REFRESH_INTERVAL_S": "0.1"}
    system = System(repository, is_fused=is_fused, **{**quick, **settings})
    try:
        yield system
    finally:
        system.stop()


NO_VERDICT = ("not been asked", "being loaded")


def why_not_ready(system: System, model: str, pair: str = "1.1") -> str:
    """The `ready` answer's reason, once there is a verdict on the pair, or on the model if that is ""; "" when it is ready."""

    def has_verdict() -> bool:
        _, entries = system.rest("/v2/repository/index", {})
        return any(
            (entry["name"], entry["version"]) == (model, pair)
            and (
                entry["state"] == "READY"
                or (entry["state"] == "UNAVAILABLE" and not any(each in entry["reason"] for each in NO_VERDICT))
            )
            for entry in entries
        )

    wait_until(has_verdict, f"a verdict on {model} {pair}")
    status, answer = system.rest(f"/v2/models/{model}/versions/{pair}/ready" if pair else f"/v2/models/{model}/ready")
    assert status == (503 if answer.get("error") else 200)
    return str(answer.get("error", ""))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)


def publish_halves(repository: Path, name: str, scale: float = 2.0) -> None:
    """A model that answers ``scale * x + 1``."""
    publish_preprocessor(FunctionTransformer().fit(ROWS), ROWS, name=name, repository=repository)
    publish_predictor(affine_model(2, scale, 1.0), ROWS.astype(np.float32), name=name, repository=repository)
    release(name, "1.1", repository=repository, accept_unknown_features=True)


def test_a_service_with_a_key_loads_signed_bundles_only(tmp_path: Path) -> None:
    """An unsigned bundle is refused until it is signed; one signed with another key stays refused."""
    repository = tmp_path / "models"
    ours, others = make_keys(tmp_path), make_keys(tmp_path, "others")
    for name in ("signed", "unsigned", "foreign"):
        publish_halves(repository, name)
    assert run_command("sign", "--repository", repository, "--key", ours.private, "signed").exit_code == 0
    assert run_command("sign", "--repository", repository, "--key", others.private, "foreign").exit_code == 0

    with serving(repository, MODEL_SIGNATURE_KEY=str(ours.public)) as system:
        signed = why_not_ready(system, "signed")
        unsigned, foreign = why_not_ready(system, "unsigned", ""), why_not_ready(system, "foreign", "")
        run_command("sign", "--repository", repository, "--key", ours.private, "unsigned")
        wait_until(lambda: system.rest("/v2/models/unsigned/ready")[0] == 200, "ready once it is signed")

    assert signed == ""
    assert 'not signed; "splitserve sign" adds model.sig' in unsigned
    assert "foreign/releases/0001-1.1: model.sig: Key mismatch" in foreign


@pytest.mark.parametrize("module", ["predict_service", "preprocess_service", "fused_service"])
def test_an_invalid_key_stops_a_service_before_it_listens(tmp_path: Path, module: str) -> None:
    """With status 2 and the name of the variable."""
    (tmp_path / "key.pem").write_text("no key")
    answer = subprocess.run(
        [sys.executable, "-m", module], env={"MODEL_SIGNATURE_KEY": str(tmp_path / "key.pem")}, capture_output=True, text=True
    )

    assert answer.returncode == 2
    assert answer.stderr.startswith("MODEL_SIGNATURE_KEY: ")
    assert str(tmp_path / "key.pem") in answer.stderr
    assert "listening" not in answer.stdout


def pickled() -> FunctionTransformer:
    """Passes rows on, and holds something that skops cannot."""
    return FunctionTransformer(np.nan_to_num, inv_kw_args={"pattern": re.compile("a")}).fit(ROWS)


def test_a_pickle_is_served_only_where_a_setting_allows_it(tmp_path: Path) -> None:
    """It is refused before it is read; allowed, the metadata says that it is one."""
    bundle = publish_preprocessor(pickled(), ROWS, name="m", repository=tmp_path, allow_pickle=True)
    publish_predictor(affine_model(2, 2.0, 1.0), ROWS.astype(np.float32), name="m", repository=tmp_path)
    assert (bundle.folder / "pipeline.joblib").exists()

    with serving(tmp_path, **UNRELEASED) as system:
        refused = why_not_ready(system, "m")
    with serving(tmp_path, PREPROCESS_ALLOW_UNSAFE_PICKLE="true", **UNRELEASED) as system:
        allowed = why_not_ready(system, "m")
        _, metadata = system.rest("/v2/models/m")

    assert "pipeline.joblib: a pickle, and loading one runs any code that is in it" in refused
    assert "PREPROCESS_ALLOW_UNSAFE_PICKLE=true" in refused
    assert allowed == ""
    assert "a pickle, which can run any code, allowed by a setting" in metadata["properties"]["warnings"]


def colours(*order: str) -> Pipeline:
    """A pipeline that one-hot encodes a colour, the categories in this order."""
    rows = pd.DataFrame({"colour": ["red", "green", "blue", "red", "green", "blue"]})
    encoder = OneHotEncoder(categories=[list(order)], sparse_output=False)
    return make_pipeline(encoder, LogisticRegression()).fit(rows, [0, 1, 1, 0, 1, 1])


def test_a_category_in_another_place_is_refused_although_every_shape_agrees(tmp_path: Path) -> None:
    """The previous pair keeps serving; the new one would have answered wrongly."""
    rows = pd.DataFrame({"colour": ["red", "green", "blue"]})
    publish(colours("red", "green", "blue"), rows, name="m", repository=tmp_path)
    request = {"instances": [{"colour": "red"}]}

    with serving(tmp_path, is_fused=False, **UNRELEASED) as system:
        before = why_not_ready(system, "m")
        _, answer = system.rest("/v1/models/m:predict", request)
        publish_preprocessor(colours("blue", "green", "red")[:-1], rows, name="m", repository=tmp_path)
        reason = why_not_ready(system, "m", "2.1")
        _, still = system.rest("/v1/models/m:predict", request)
        _, metadata = system.rest("/v2/models/m")
    release("m", "2.1", repository=tmp_path, accept_changed_features=True)
    with serving(tmp_path) as system:
        admitted = why_not_ready(system, "m", "2.1")
        known = why_not_ready(system, "m", "1.1")
        _, allowed = system.rest("/v2/models/m/versions/2.1")
        _, unsuspicious = system.rest("/v2/models/m/versions/1.1")

    assert before == admitted == known == ""
    assert reason.endswith(
        'the halves do not fit: feature 0: expected "colour_red", which the predictor was trained on, got "colour_blue"; '
        '"splitserve release m 2.1" compares the numbers'
    )
    assert answer["predictions"] == still["predictions"]
    assert metadata["versions"] == ["1.1"]
    assert "changed features, accepted by its release" in allowed["properties"]["warnings"]
    assert "warnings" not in unsuspicious["properties"]


def other_numbers(folder: Path) -> None:
    """Exchange a predictor's model for one that answers otherwise, with a manifest that knows the new digest."""
    import hashlib
    import json

    model = onnx.load_from_string((folder / "model.onnx").read_bytes())
    scale = next(each for each in model.graph.initializer if each.name == "scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.array(2.5, np.float32), "scale"))
    data = model.SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def why_not_ready_over_grpc(system: System, model: str, pair: str) -> str:
    """What the trailing metadata of ModelReady says."""
    with grpc.insecure_channel(system.grpc) as channel:
        request = pb.ModelReadyRequest(name=model, version=pair).SerializeToString()
        answer, call = channel.unary_unary(f"/{protobuf.SERVICE}/ModelReady").with_call(request)
    assert not pb.ModelReadyResponse.FromString(answer).ready
    return dict(call.trailing_metadata())[protobuf.REASON_KEY].decode()


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_a_version_whose_numbers_differ_shows_the_worst_difference_everywhere(tmp_path: Path, is_fused: bool) -> None:
    """The log, the ready answers, the index and the commands: sample, tensor, index, expected, got."""
    publish_halves(tmp_path, "m")
    other_numbers(tmp_path / "m" / "predict" / "1")
    shutil.rmtree(tmp_path / "m" / "releases")  # which would refuse it by its digest already
    worst = 'output "scores" of golden sample 2 at [2, 1]: expected 13.0, got 16.0'

    with serving(tmp_path, is_fused=is_fused, **UNRELEASED) as system:
        ready = why_not_ready(system, "m")
        ready_over_grpc = why_not_ready_over_grpc(system, "m", "1.1")
        _, index = system.rest("/v2/repository/index", {})
        health = command("health", "--url", system.grpc)
        logged = system.processes["fused" if is_fused else "predict"].wait_for("bundle refused")
    matrix = run_command("matrix", "--repository", tmp_path)

    assert ready_over_grpc == f"m 1.1: m/predict/1: {worst}"
    assert f"(1) m/predict/1: {worst}" in matrix.stdout.splitlines()
    assert ready.endswith(f"m/predict/1: {worst}")
    assert logged == {**logged, "bundle": "m/predict/1", "reason": f"m/predict/1: {worst}"}
    assert [entry["reason"] for entry in index] == [f"m/predict/1: {worst}"]
    assert health.returncode == 1
    assert worst in " ".join(health.stdout.split())


def test_nothing_is_unpickled_on_the_way_from_the_repository_to_an_answer(tmp_path: Path) -> None:
    """Python's audit events name every class that an unpickler looks up; for the demo bundles there is none."""
    publish(colours("red", "green", "blue"), pd.DataFrame({"colour": ["red", "green", "blue"]}), name="m", repository=tmp_path)
    joblib.dump(Path("x"), tmp_path / "control")
    (tmp_path / "check.py").write_text(CHECK)

    answer = subprocess.run([sys.executable, tmp_path / "check.py", tmp_path], capture_output=True, text=True)

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["0", "1"]


CHECK = """
import sys
events = set()
sys.addaudithook(lambda event, _: events.add(event) if event.startswith(("pickle.", "marshal.loads")) else None)
from pathlib import Path
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.source import load_bundle
from splitserve.runtimes import predictor, preprocessor
from splitserve.repository.golden import decode
events.clear()  # imports read bytecode
repository = Repository(sys.argv[1])
first = load_bundle(repository, BundleKey("m", "preprocess", 1), preprocessor.load)
second = load_bundle(repository, BundleKey("m", "predict", 1), predictor.load)
bundle = repository.open(BundleKey("m", "preprocess", 1))
samples = decode(bundle.read("golden.npz"), bundle.manifest.inputs, bundle.manifest.outputs)
assert second.infer(first.transform(samples.inputs))
print(len({event for event in events if event.startswith("pickle.")}))
import joblib
joblib.load(Path(sys.argv[1]) / "control")
print(len({event for event in events if event.startswith("pickle.")}))
"""
