"""The commands: what they print, their exit status, what they do not import."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import msgspec
import numpy as np
import pandas as pd
import pytest
import skops.io
from click.testing import Result
from PIL import Image
from sklearn.datasets import load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from structlog.testing import capture_logs

from splitserve import PublishError, publish_predictor
from splitserve.cli.connection import connect
from splitserve.cli.publish import read_data
from splitserve.cli.samples import golden_instance
from splitserve.cli.up import refusals
from splitserve.oip.messages import DEFAULT, READY, RELEASE_SEQUENCE, UNAVAILABLE, InferRequest, InferResponse, ModelState
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.signing import Verifier
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor, encode_bytes
from splitserve.testing import FakeInference, serving, signature
from tests.client.ways import serving_rest
from tests.command_line import run_command
from tests.demo_models import Demos
from tests.file_server import FileServer
from tests.signing_keys import Keys, make_keys
from tests.system.models import softmax_model

IRIS, SPECIES = load_iris(return_X_y=True)
COMMAND = Path(sys.executable).with_name("splitserve")


def signed_repository(folder: Path) -> Keys:
    """A repository ``models`` in a folder with one model, ``m``, and keys to sign it with."""
    publish_predictor(softmax_model(4), np.zeros((2, 4), np.float32), name="m", repository=folder / "models")
    return make_keys(folder)


def test_sign_writes_a_signature_for_every_bundle(tmp_path: Path) -> None:
    """One line each; damaged ones are named, and the others are signed."""
    keys = signed_repository(tmp_path)
    publish_predictor(softmax_model(4), np.zeros((2, 4), np.float32), name="damaged", repository=tmp_path / "models")
    (tmp_path / "models" / "damaged" / "predict" / "1" / "model.onnx").write_bytes(b"")

    result = run_command("sign", "--repository", tmp_path / "models", "--key", keys.private)

    assert result.exit_code == 1
    assert f"m/predict/1: {tmp_path}/models/m/predict/1/model.sig" in result.output
    assert "damaged/predict/1: model.onnx: expected " in result.output
    assert " bytes as in manifest.json, got 0" in result.output
    Verifier(keys.public).check(Repository(tmp_path / "models").open(BundleKey("m", "predict", 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--key", "none.pem"], "none.pem: No such file or directory"),
        (["--key", "key.pem", "nope", "m"], "requested models not in repository models: nope"),
        (["--key", "key.pem", "--repository", "empty"], "no models found in empty"),
    ],
)
def test_sign_reports_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    """And signs nothing."""
    signed_repository(tmp_path)
    monkeypatch.chdir(tmp_path)

    result = run_command("sign", "--repository", "models", *arguments)

    assert result.exit_code == 1
    assert message in result.output
    assert not list(tmp_path.rglob("model.sig"))


async def run_beside(service: FakeInference, *arguments: Any) -> Result:
    """What a command prints against a server, whose log, which would else be part of it, is kept apart."""
    async with serving(service, stage="proxy") as address:
        with capture_logs():
            return await asyncio.to_thread(run_command, *arguments, "--url", address)


async def run_process_beside(service: FakeInference, *arguments: Any) -> subprocess.CompletedProcess[str]:
    async with serving(service, stage="proxy") as address:
        return await run_at(address, *arguments)


async def run_at(address: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own: one that speaks gRPC by grpcio shares its poller with all loops of a process."""
    process = await asyncio.create_subprocess_exec(
        COMMAND, *map(str, arguments), "--url", address, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(arguments, process.returncode, out.decode(), err.decode())


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["up"],
        ["serve"],
        ["publish"],
        ["models"],
        ["index"],
        ["matrix"],
        ["sign"],
        ["infer"],
        ["health"],
        ["verify"],
        ["reload"],
    ],
)
def test_every_command_has_help(command: list[str]) -> None:
    """Names its arguments, says what it does."""
    result = run_command(*command, "--help")

    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert "--help" in result.output


def test_help_imports_no_heavy_packages() -> None:
    """What a command needs is imported when it is called, so that help comes at once."""
    check = (
        "import sys; from typer.testing import CliRunner; from splitserve.cli import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "print(sorted({'grpc', 'numpy', 'pandas', 'sklearn', 'onnxruntime', 'pydantic', 'rich', 'msgspec'} & set(sys.modules)))"
    )

    loaded = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout

    assert loaded.strip() == "[]"


def test_the_version_is_the_packages() -> None:
    """``--version`` prints it and nothing else."""
    from splitserve import __version__

    assert run_command("--version").output.strip() == __version__


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A pipeline and its data, as files of every kind that the command reads."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)
    skops.io.dump(pipeline, tmp_path / "pipeline.skops")
    skops.io.dump(pipeline[:-1], tmp_path / "transforms.skops")
    joblib.dump(pipeline, tmp_path / "pipeline.joblib")
    np.save(tmp_path / "rows.npy", IRIS)
    np.savez(tmp_path / "sample.npz", features=np.zeros((2, 4), np.float32))
    (tmp_path / "model.onnx").write_bytes(softmax_model(4))
    frame = pd.DataFrame(IRIS, columns=["a", "b", "c", "d"])
    frame.to_csv(tmp_path / "rows.csv", index=False)
    by_name = make_pipeline(StandardScaler(), LogisticRegression()).fit(frame, SPECIES)
    skops.io.dump(by_name, tmp_path / "by_name.skops")
    return tmp_path


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "printed", "written"),
    [
        (["--pipeline", "pipeline.skops", "--data", "rows.npy"], "m 1.1, release 1: ", {"preprocess": [1], "predict": [1]}),
        (["--pipeline", "by_name.skops", "--data", "rows.csv"], "m 1.1, release 1: ", {"preprocess": [1], "predict": [1]}),
        (
            ["--pipeline", "pipeline.joblib", "--allow-pickle", "--data", "rows.npy", "--version", "4"],
            "m 4.4, release 1: ",
            {"preprocess": [4], "predict": [4]},
        ),
        (["--transformer", "transforms.skops", "--data", "rows.npy"], "m/preprocess/1: ", {"preprocess": [1], "predict": []}),
        (["--onnx", "model.onnx", "--data", "sample.npz"], "m/predict/1: ", {"preprocess": [], "predict": [1]}),
        (
            ["--onnx", "model.onnx", "--data", "sample.npz", "--trained-on", "transforms.skops"],
            "m/predict/1: ",
            {"preprocess": [], "predict": [1]},
        ),
    ],
)
def test_publish_writes_the_given_files(
    files: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], printed: str, written: dict[str, list[int]]
) -> None:
    """A pipeline becomes both halves, transforms a preprocessor, an ONNX model a predictor."""
    monkeypatch.chdir(files)

    result = run_command("publish", "m", "--repository", "models", *options)

    assert result.output.startswith(printed), result.output
    assert {kind: Repository("models").versions("m", kind) for kind in ("preprocess", "predict")} == written  # type: ignore[arg-type]


@pytest.mark.heavy
def test_publish_names_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of y's columns."""
    monkeypatch.chdir(tmp_path)
    rows = np.arange(60.0).reshape(30, 2) % 7
    skops.io.dump(make_pipeline(LinearRegression()).fit(rows, rows[:, ::-1]), "pipeline.skops")
    np.save("rows.npy", rows)
    common = ("publish", "m", "--repository", "models", "--data", "rows.npy", "--target", "price", "--target", "weight")

    result, wrong = run_command(*common, "--pipeline", "pipeline.skops"), run_command(*common, "--transformer", "pipeline.skops")

    assert result.exit_code == 0, result.output
    manifest = Repository("models").open(BundleKey("m", "preprocess", 1)).manifest
    assert manifest.output_labels == {"prediction": ("price", "weight")}
    assert "--target goes with --pipeline or --mlflow" in wrong.output


@pytest.mark.heavy
def test_halves_published_separately_can_be_bound_by_trained_on(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--trained-on` gives the predictor the fingerprint of the transforms."""
    monkeypatch.chdir(files)
    common = ("publish", "m", "--repository", "models")
    assert run_command(*common, "--transformer", "transforms.skops", "--data", "rows.npy").exit_code == 0

    result = run_command(*common, "--onnx", "model.onnx", "--data", "sample.npz", "--trained-on", "transforms.skops")

    keys = BundleKey("m", "preprocess", 1), BundleKey("m", "predict", 1)
    first, second = (Repository("models").open(key).manifest for key in keys)
    assert result.exit_code == 0, result.output
    assert first.fingerprint == second.fingerprint != ""


@pytest.mark.heavy
def test_halves_of_the_same_rows_are_released_from_the_shell(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--trained-on` and `--rows`, the rows that the data were made from, a release knows that the features are equal."""
    monkeypatch.chdir(files)
    transforms = make_pipeline(StandardScaler()).fit(IRIS)
    np.savez("features.npz", features=transforms.transform(IRIS).astype(np.float32))
    common = ("publish", "m", "--repository", "models")
    written = [
        run_command(*common, "--transformer", "transforms.skops", "--data", "rows.npy"),
        run_command(
            *common, "--onnx", "model.onnx", "--data", "features.npz", "--trained-on", "transforms.skops", "--rows", "rows.npy"
        ),
    ]

    released = run_command("release", "m", "1.1", "--repository", "models", "--yes")

    assert [result.exit_code for result in written] == [0, 0], [result.output for result in written]
    assert "features: equal to those trained on" in released.output
    assert "released m 1.1 as release 1" in released.output


@pytest.mark.heavy
def test_transforms_that_skops_cannot_store_are_pickled_only_if_allowed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning, since services refuse pickles by default."""
    monkeypatch.chdir(files)
    joblib.dump(FunctionTransformer(np.nan_to_num, inv_kw_args={"pattern": re.compile("a")}).fit(IRIS), "pattern.joblib")
    command = ("publish", "m", "--repository", "models", "--transformer", "pattern.joblib", "--data", "rows.npy")

    refused = run_command(*command)
    published = run_command(*command, "--allow-pickle")

    assert refused.exit_code == 1
    assert published.exit_code == 0, published.output
    assert "PREPROCESS_ALLOW_UNSAFE_PICKLE=true" in published.output
    assert Path("models/m/preprocess/1/pipeline.joblib").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pipeline", "pipeline.joblib", "--data", "rows.npy"], "reading a pickle runs the code in it"),
        (["--pipeline", "missing.skops", "--data", "rows.npy"], "missing.skops"),
        (["--pipeline", "rows.npy", "--data", "rows.npy"], "expected .skops"),
        (["--pipeline", "pipeline.skops", "--data", "model.onnx"], "expected .csv, .parquet, .npy or .npz"),
        (["--pipeline", "pipeline.skops", "--data", "missing.csv"], "missing.csv"),
        (["--data", "rows.npy"], "give one of --pipeline, --transformer, --onnx and --mlflow"),
        (
            ["--pipeline", "pipeline.skops", "--trained-on", "transforms.skops", "--data", "rows.npy"],
            "--trained-on goes with --onnx",
        ),
        (["--pipeline", "pipeline.skops", "--rows", "rows.npy", "--data", "rows.npy"], "--rows goes with --onnx or --mlflow"),
    ],
)
def test_publish_reports_errors(files: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    """One line, no traceback, and an exit status other than 0."""
    monkeypatch.chdir(files)

    result = run_command("publish", "m", "--repository", "models", *options)

    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output
    assert not Path("models").exists()


def test_rows_may_be_a_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the dtypes of columns; what reads it may be missing."""
    (path := tmp_path / "rows.parquet").touch()
    rows = pd.DataFrame({"colour": pd.Categorical(["red"])})
    monkeypatch.setattr(pd, "read_parquet", {path: rows}.get)
    assert read_data(path) is rows

    def missing(_: Path) -> None:
        raise ImportError("pyarrow")

    monkeypatch.setattr(pd, "read_parquet", missing)
    with pytest.raises(PublishError, match="rows.parquet: pandas reads Parquet with pyarrow: pip install pyarrow"):
        read_data(path)


def test_models_lists_bundles_and_names_broken_ones(demos: Demos, tmp_path: Path) -> None:
    """A row each; a broken manifest is a reason to exit 1."""
    import shutil

    shutil.copytree(demos.repository, tmp_path / "models")
    whole = run_command("models", "--repository", tmp_path / "models")
    (tmp_path / "models" / "digits" / "predict" / "1" / "manifest.json").write_text("{")

    broken = run_command("models", "--repository", tmp_path / "models")

    assert (whole.exit_code, broken.exit_code) == (0, 1)
    assert "penguins" in whole.output
    assert "broken: manifest.json" in broken.output
    assert run_command("models", "--repository", tmp_path / "nowhere").exit_code == 1


def echo_service() -> FakeInference:
    """Gives a label and two scores for each row of columns ``size`` and ``word``."""

    def answer(request: InferRequest) -> InferResponse:
        word = next(tensor for tensor in request.inputs if tensor.name == "word")
        n_rows = word.n_rows
        scores = Tensor("scores", "FP32", (n_rows, 2), np.array([[0.25, 0.75]] * n_rows, np.float32).tobytes())
        return InferResponse("m", "1.1", (Tensor("label", "BYTES", (n_rows,), word.raw), scores))

    inputs = [TensorSpec("size", "FP64", ("batch", 1)), TensorSpec("word", "BYTES", ("batch", 1))]
    outputs = [TensorSpec("label", "BYTES", ("batch",)), TensorSpec("scores", "FP32", ("batch", 2))]
    return FakeInference(signature("m", inputs, outputs, version="1.1"), answer=answer)


@pytest.mark.parametrize("form", ["records.json", "object.json", "rows.json", "rows.csv"])
async def test_infer_sends_a_file_and_prints_a_table(tmp_path: Path, form: str) -> None:
    """Records, rows, an object with instances, or a CSV with a header: the same request."""
    records = [{"size": 1.5, "word": "one"}, {"size": None, "word": "two"}]
    contents = {
        "records.json": json.dumps(records),
        "object.json": json.dumps({"instances": records}),
        "rows.json": json.dumps([list(record.values()) for record in records]),
        "rows.csv": "size,unused,word\n1.5,x,one\n,y,two\n",
    }
    (tmp_path / form).write_text(contents[form])
    service = echo_service()

    result = await run_beside(service, "infer", "m", tmp_path / form)

    assert result.exit_code == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["m", "1.1"],
        ["label", "scores"],
        ["one", "0.25", "0.75"],
        ["two", "0.25", "0.75"],
    ]
    size = next(tensor for tensor in service.requests[0].inputs if tensor.name == "size")
    np.testing.assert_array_equal(np.frombuffer(size.raw), [1.5, np.nan])


@pytest.mark.parametrize(
    ("labels", "header", "row"),
    [
        (["no", "yes"], ["label", "scores_no", "scores_yes"], ["one", "0.25", "0.75"]),
        (["no", "yes", "third"], ["label", "scores"], ["one", "0.25", "0.75"]),
    ],
    ids=["a column each", "of another number"],
)
async def test_infer_names_the_columns_after_the_classes(labels: list[str], header: list[str], row: list[str]) -> None:
    """Of the model's metadata."""
    service = echo_service()
    known = service.signatures["m", "1.1"]
    service.signatures["m", "1.1"] = msgspec.structs.replace(known, properties={"labels": json.dumps(labels)})

    result = await run_beside(service, "infer", "m", "--rows", '[{"size": 1, "word": "one"}]')

    assert [line.split() for line in result.stdout.splitlines()] == [["m", "1.1"], header, row]


async def test_infer_names_the_best_of_many_classes() -> None:
    """Their indices where there are no labels."""
    service = FakeInference(signature("m", [TensorSpec("x", "FP32", ("batch", 1))], [TensorSpec("y", "FP32", ("batch", 20))]))
    known = service.signatures["m", "1"]
    labels = json.dumps([f"class {number}" for number in range(20)])
    service.signatures["m", "1"] = msgspec.structs.replace(known, properties={"labels": labels})
    values = np.arange(20, dtype=np.float32)
    service._answer = lambda request: InferResponse("m", "1", (Tensor("y", "FP32", (1, 20), values.tobytes()),))

    result = await run_beside(service, "infer", "m", "--rows", "[[1.0]]")

    assert "19 [class 19] 18 [class 18] 17 [class 17] 16 [class 16] 15 [class 15] … of 20" in result.stdout


async def test_infer_sends_an_image_as_it_is(tmp_path: Path) -> None:
    """One BYTES element, the file's own bytes."""
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.png")
    service = FakeInference(signature("m", [TensorSpec("image", "BYTES", ("batch", 1))]))
    service._answer = lambda request: InferResponse("m", "1", (Tensor("label", "BYTES", (1,), encode_bytes([b"cat"])),))

    result = await run_beside(service, "infer", "m", tmp_path / "cat.png")

    assert "cat" in result.stdout
    assert service.requests[0].inputs[0].raw == encode_bytes([(tmp_path / "cat.png").read_bytes()])


async def test_infer_reports_an_error_in_one_line(tmp_path: Path) -> None:
    """The server's own words, exit status 1."""
    result = await run_beside(echo_service(), "infer", "nope", "--rows", "[]")

    assert result.exit_code == 1
    assert result.stderr == "Request for unknown model: 'nope' is not found\n"


def test_infer_requires_rows() -> None:
    """From a file or from the command line, exactly one of them."""
    neither, both = run_command("infer", "m"), run_command("infer", "m", "rows.json", "--rows", "[]")

    assert (neither.exit_code, both.exit_code) == (2, 2)
    assert neither.output == both.output == "expected a file or --rows, got both or neither\n"


def test_up_names_the_models_that_it_does_not_serve() -> None:
    """Between the logs of the start they would be overlooked."""
    states = [ModelState("a", "1.1", READY), ModelState("b", "1.2", UNAVAILABLE, "a type is not allowed")]

    assert refusals(states) == ["not ready: b 1.2: a type is not allowed"]


def test_a_rest_address_is_no_grpc_address(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a predict service, which speaks gRPC only; a port that answers in HTTP/1.1 would look like one that is away."""
    with pytest.raises(SystemExit) as ended:
        connect("http://127.0.0.1:8000", stage="predict")

    assert ended.value.code == 2
    assert 'expected the address of a gRPC face, host:port, got "http://127.0.0.1:8000"' in capsys.readouterr().err


async def test_health_lists_what_is_ready_and_why_the_rest_is_not() -> None:
    """Exit status 1 only if nothing is ready."""
    service = echo_service()
    service.states.append(ModelState("other", "2.1", UNAVAILABLE, "damaged"))

    some = await run_process_beside(service, "health")
    service.states = service.states[1:]
    none = await run_process_beside(service, "health")

    assert (some.returncode, none.returncode) == (0, 1)
    assert "damaged" in some.stdout


async def test_health_says_which_release_serves_by_default() -> None:
    """As the index says it; a third-party server may say nothing."""
    service = echo_service()
    service.states = [
        ModelState("m", "1.1", READY, properties={RELEASE_SEQUENCE: "3", DEFAULT: "true"}),
        ModelState("m", "2.1", READY, properties={RELEASE_SEQUENCE: "2"}),
        ModelState("n", "1.0", READY),
    ]

    shown = await run_process_beside(service, "health")

    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert lines[1:] == ["m 1.1 3, default READY", "m 2.1 2 READY", "n 1.0 - READY"]


async def test_health_without_models_reports_what_the_system_waits_for() -> None:
    """Instead of an empty table."""
    async with serving(FakeInference(not_ready="waiting for the model repository: s3://m: not found")) as address:
        result = await run_at(address, "health")

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(
        f"{address}: the proxy service is not ready: waiting for the model repository: s3://m: not found"
    )


def test_health_reports_an_unreachable_system() -> None:
    """A line with the address that was asked."""
    result = run_command("health", "--url", "127.0.0.1:1")

    assert result.exit_code == 1
    assert result.output == "127.0.0.1:1: the proxy service cannot be reached\n"


@pytest.mark.parametrize("model", ["penguins", "breast-cancer", "digits"])
def test_an_example_is_the_first_golden_sample(demos: Demos, model: str) -> None:
    """What ``up`` prints to paste is a request that the model was published with."""
    rows = demos.models[model].rows

    instance = golden_instance(demos.repository, model)

    first = rows.iloc[0].to_dict() if hasattr(rows, "iloc") else rows[0].tolist()
    assert instance == first


def test_index_lists_a_repository_for_web_servers(tmp_path: Path) -> None:
    """Also if some bundles are broken: they are named, and the exit status is 1."""
    publish_predictor(softmax_model(4), np.zeros((2, 4), np.float32), name="m", repository=tmp_path)
    whole = run_command("index", "--repository", tmp_path)
    publish_predictor(softmax_model(4), np.zeros((2, 4), np.float32), name="m", repository=tmp_path)
    (tmp_path / "m" / "predict" / "2" / "manifest.json").write_bytes(b"?")
    broken = run_command("index", "--repository", tmp_path)
    nowhere = run_command("index", "--repository", tmp_path / "nowhere")

    listed = f"{tmp_path}/index.json: 1 bundles, 0 releases, 0 routes\n"
    assert (whole.exit_code, whole.output) == (0, listed)
    assert broken.exit_code == 1
    assert broken.stderr.startswith("omitted: m/predict/2: manifest.json: ")
    assert broken.stdout == listed
    assert (nowhere.exit_code, nowhere.output) == (1, f"{tmp_path}/nowhere: no such folder\n")


def test_models_lists_bundles_at_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fetches manifests only; if that fails, the reason is printed."""
    monkeypatch.setenv("MODEL_CACHE", str(tmp_path / "cache"))
    publish_predictor(softmax_model(4), np.zeros((2, 4), np.float32), name="m", repository=tmp_path / "models")
    server = FileServer(tmp_path / "models")
    with server.running():
        without_index = run_command("models", "--repository", server.url)
        run_command("index", "--repository", tmp_path / "models")
        server.requests.clear()
        result = run_command("models", "--repository", server.url)

    assert without_index.exit_code == 1
    assert without_index.output == f'{server.url}: index.json: not found; "splitserve index" writes it\n'
    assert result.exit_code == 0
    assert "predict" in result.output
    assert [path for path, _ in server.requests] == ["index.json", "m/predict/1/manifest.json"]


async def test_reload_needs_a_name_where_no_model_is_known() -> None:
    """Without a name there is nothing to reload, which must not look like success."""
    service = FakeInference()
    async with serving(service, allow_control=True) as address:
        nameless, named = await run_at(address, "reload"), await run_at(address, "reload", "m")

    assert (nameless.returncode, nameless.stderr) == (1, f"{address}: no models yet; name the new model\n")
    assert (named.returncode, named.stdout) == (0, "reloaded m\n")
    assert service.controlled == [("load", "m")]


async def test_reload_over_rest() -> None:
    """As over gRPC: all models or those that are named; an error names the address and the way out."""
    service = FakeInference(signature("m", [TensorSpec("x", "FP32", ("batch", 1))]))
    async with serving_rest(service, allow_control=True) as url, serving_rest(service) as closed:
        every, named, refused = await run_at(url, "reload"), await run_at(url, "reload", "n"), await run_at(closed, "reload")

    assert (every.returncode, every.stdout) == (0, "reloaded m\n")
    assert (named.returncode, named.stdout) == (0, "reloaded n\n")
    assert service.controlled == [("load", "m"), ("load", "n")]
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"{closed}: ")
    assert "ALLOW_REPOSITORY_CONTROL=true enables it" in refused.stderr


def test_a_bucket_has_no_index() -> None:
    """It is listed, and is written by publishing only."""
    result = run_command("index", "--repository", "s3://bucket/models")

    assert result.exit_code == 2
    assert "services list buckets themselves and need no index there" in result.output
    assert not Path("s3:").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["publish", "m", "--data", "rows.npy", "--transformer", "transforms.skops"],
        ["release", "m", "1.1"],
        ["rollback", "m"],
        ["release", "--withdraw", "m", "1"],
    ],
)
def test_a_web_server_is_not_written(files: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """The error names the way out: publish to a folder, then upload."""
    monkeypatch.chdir(files)
    result = run_command(*command, "--repository", "http://127.0.0.1:1/models")

    assert result.exit_code == 1
    assert 'http://127.0.0.1:1/models cannot be written: publish to a folder, run "splitserve index"' in result.output
    assert not Path("s3:").exists()
