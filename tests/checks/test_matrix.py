"""The support matrix: which releases serve, which pairs could become one, what must not be deployed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from splitserve import publish, publish_predictor, publish_preprocessor, withdraw
from splitserve.arrays import from_array, to_array
from splitserve.checks.across import Passed, Step, across, combine, take_step
from splitserve.checks.examination import Allowed, Report, Trial, examine
from splitserve.checks.matrix import HERE, Matrix, judge
from splitserve.repository import golden as goldens
from splitserve.repository import release_log
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE
from splitserve.repository.release import ReleaseKey
from splitserve.repository.release import encode as encode_release
from splitserve.repository.releases import decode_release
from splitserve.repository.signing import Signer
from splitserve.repository.source import load_bundle
from splitserve.repository.sources.index import build as build_index
from splitserve.repository.sources.index import write as write_index
from splitserve.runtimes.release import golden_of
from splitserve.tensors import Tensor
from splitserve.versions import Pair
from tests.command_line import run_command
from tests.file_server import FileServer
from tests.signing_keys import make_keys
from tests.system.models import softmax_model

FRAME = pd.DataFrame({"colour": ["red", "green", "blue"] * 4, "size": np.arange(12.0)})
IS_LARGE = FRAME["size"] > 5


def one_hot(*order: str) -> Any:
    """The same columns, the categories in this order."""
    return make_column_transformer(
        (OneHotEncoder(categories=[list(order)], sparse_output=False), ["colour"]), (StandardScaler(), ["size"])
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``paint`` 1.1, which fits, and a preprocessor 2 with its categories in another order."""
    folder = tmp_path_factory.mktemp("models")
    pipeline = make_pipeline(one_hot("red", "green", "blue"), LogisticRegression()).fit(FRAME, IS_LARGE)
    publish(pipeline, FRAME, name="paint", repository=folder)
    publish_preprocessor(one_hot("green", "red", "blue").fit(FRAME), FRAME, name="paint", repository=folder)
    return folder


@pytest.fixture
def models(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(published, tmp_path / "models"))


def matrix_of(models: Path, **allowed: Any) -> Matrix:
    """Of this environment."""
    source, wishes = Repository(models), Allowed(**allowed)
    return judge(source, {HERE: examine(source, wishes)})


def reasons(matrix: Matrix, column: str = HERE) -> dict[str, str]:
    """Why each release, and each pair without one, is refused, "" for those that are admitted."""
    return {each.pair: "; ".join(each.verdicts[column].reasons) for each in (*matrix.releases, *matrix.pairs)}


def write_route(models: Path, pair: str) -> None:
    (models / "paint" / "route.json").write_text(json.dumps({"pairs": [{"pair": pair}]}))


def test_releases_and_possible_releases_are_listed_separately(published: Path) -> None:
    """The feature that differs is named, although every shape agrees."""
    matrix = matrix_of(published)

    assert [(each.pair, each.sequence, each.serves) for each in matrix.releases] == [("1.1", 1, "by default")]
    assert [each.pair for each in matrix.pairs] == ["2.1"]
    assert reasons(matrix) == {
        "1.1": "",
        "2.1": 'the halves do not fit: feature 0: expected "onehotencoder__colour_red", which the predictor was trained on, '
        'got "onehotencoder__colour_green"',
    }
    assert [trial.golden for trial in matrix.environments[HERE].trials] == ["agree"] * 3
    assert matrix.environments[HERE].releases == (Trial("paint/releases/0001-1.1", golden="agree"),)
    assert matrix.made_with["paint/predict/1"].startswith("ONNX IR ")
    assert matrix.problems == ()


def test_the_whole_of_a_release_is_run(models: Path) -> None:
    """Both halves give what they promise, and the answer is not the recorded one: that of the newest release decides."""
    change_release(models, lambda golden: Golden(golden.inputs, tuple(shifted(each) for each in golden.outputs)))

    matrix = matrix_of(models)

    assert [trial.golden for trial in matrix.environments[HERE].trials] == ["agree"] * 3
    assert reasons(matrix)["1.1"].startswith('paint/releases/0001-1.1: output "probabilities" of golden sample')
    (problem,) = matrix.problems
    assert problem.startswith("here: paint 1.1, release 1, which serves by default, is refused: paint/releases/0001-1.1: ")


def test_a_half_that_is_not_the_one_that_was_released_is_refused(models: Path, tmp_path: Path) -> None:
    """Another valid bundle in its place, under the same number."""
    other = make_pipeline(one_hot("red", "green", "blue"), LogisticRegression(C=0.1)).fit(FRAME, IS_LARGE)
    publish(other, FRAME, name="paint", repository=tmp_path / "other")
    shutil.rmtree(models / "paint" / "predict" / "1")
    shutil.copytree(tmp_path / "other" / "paint" / "predict" / "1", models / "paint" / "predict" / "1")

    matrix = matrix_of(models)

    assert "paint/predict/1: is not the bundle that was released: expected the sha256 " in reasons(matrix)["1.1"]
    assert len(matrix.problems) == 1


def test_a_record_that_cannot_be_used_is_a_problem(models: Path) -> None:
    """It may withdraw a release."""
    manifest = models / "paint" / "releases" / "0001-1.1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("pipeline", "halves"))

    problems = matrix_of(models).problems

    assert problems[0].startswith("paint/releases/0001-1.1: manifest.json: its bytes are not those of its digest")
    assert problems[1] == "paint has no release: splitserve release paint K.M records one"


def change_release(models: Path, change: Callable[[Golden], Golden]) -> None:
    """Record the release of 1.1 anew with other golden samples, and digests that are right."""
    key = ReleaseKey("paint", 1, Pair(1, 1))
    folder = models / str(key)
    manifest = decode_release((folder / MANIFEST_FILE).read_bytes(), key)
    data = goldens.encode(change(golden_of(manifest, (folder / GOLDEN_FILE).read_bytes())))
    (folder / GOLDEN_FILE).write_bytes(data)
    changed = msgspec.structs.replace(manifest, files=release_log.digests({GOLDEN_FILE: data}))
    (folder / MANIFEST_FILE).write_bytes(encode_release(changed))


def shifted(tensor: Tensor) -> Tensor:
    return from_array(tensor.name, to_array(tensor) + np.float32(0.25)) if tensor.datatype == "FP32" else tensor


def test_features_that_do_not_fit_in_shape_are_refused(models: Path) -> None:
    """With the dimension that differs."""
    publish_predictor(softmax_model(9), np.zeros((2, 9), np.float32), name="paint", repository=models)

    found = reasons(matrix_of(models))

    assert found["1.2"] == 'the halves do not fit: "features": expected 9 in dimension 1, the preprocessor produces 4'
    assert found["1.1"] == ""


def test_a_damaged_bundle_is_refused_with_its_pairs_and_no_others(models: Path) -> None:
    """The file is named."""
    file = models / "paint" / "preprocess" / "2" / "pipeline.skops"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")

    matrix = matrix_of(models)

    assert reasons(matrix)["2.1"].startswith("paint/preprocess/2: pipeline.skops: expected sha256")
    assert reasons(matrix)["1.1"] == ""


def test_an_unreadable_manifest_refuses_its_pairs_and_no_others(models: Path) -> None:
    """The versions it was made with are unknown."""
    (models / "paint" / "preprocess" / "2" / "manifest.json").write_text("{")

    matrix = matrix_of(models)

    assert reasons(matrix)["2.1"].startswith("paint/preprocess/2: manifest.json: ")
    assert reasons(matrix)["1.1"] == ""
    assert "paint/preprocess/2" not in matrix.made_with


def test_differing_golden_samples_are_distinguished_from_other_refusals(models: Path) -> None:
    """Loaded, run, and another number came out: that is not a damaged file."""
    repository = Repository(models)
    bundle = repository.open(BundleKey("paint", "predict", 1))
    golden = goldens.decode(bundle.read(GOLDEN_FILE), bundle.manifest.inputs, bundle.manifest.outputs)
    changed = Golden(golden.inputs, tuple(shifted(each) for each in golden.outputs))
    files = {MODEL_FILE: bundle.read(MODEL_FILE), GOLDEN_FILE: goldens.encode(changed)}
    repository.write(msgspec.structs.replace(bundle.manifest, version=2), files)

    matrix = matrix_of(models)

    assert {trial.name: trial.golden for trial in matrix.environments[HERE].trials if "predict" in trial.name} == {
        "paint/predict/1": "agree",
        "paint/predict/2": "differ",
    }
    assert reasons(matrix)["1.2"].startswith('paint/predict/2: output "probabilities" of golden sample')


def test_releases_that_do_not_serve_by_default_are_no_problem(models: Path) -> None:
    """The newest and that of the route decide."""
    publish(make_pipeline(one_hot("red", "green", "blue"), LogisticRegression()).fit(FRAME, IS_LARGE), FRAME, name="paint",
            repository=models)  # fmt: skip
    (models / "paint" / "predict" / "1" / "model.onnx").unlink()

    fine = matrix_of(models)
    write_route(models, "1.1")
    bad = matrix_of(models)

    assert fine.problems == ()
    assert [(each.pair, each.serves) for each in fine.releases] == [("1.1", ""), ("3.2", "by default")]
    assert [(each.pair, each.serves) for each in bad.releases] == [("1.1", "by route"), ("3.2", "by default")]
    (problem,) = bad.problems
    assert problem.startswith("here: paint 1.1, release 1, which serves by route, is refused: paint/predict/1: model.onnx")


@pytest.mark.parametrize("pair", ["2.1", "1.7"])
def test_a_route_that_names_a_pair_without_a_release_is_a_problem(models: Path, pair: str) -> None:
    """Published or not: nothing shows that it answers as in training."""
    write_route(models, pair)

    assert matrix_of(models).problems == (
        f"paint {pair}, named by its route, has no release: splitserve release paint {pair} records one",
    )


def test_a_model_without_a_release_that_serves_is_a_problem(models: Path) -> None:
    """Services answer nothing for it."""
    (models / "paint" / "predict" / "1" / "model.onnx").unlink()
    publish_predictor(softmax_model(4), np.zeros((2, 4), np.float32), name="half", repository=models)

    first, second = sorted(matrix_of(models).problems)

    assert first == "half has no release: splitserve release half K.M records one"
    assert second.startswith("here: paint 1.1, release 1, which serves by default, is refused: paint/predict/1: model.onnx")


def test_a_withdrawn_release_does_not_decide(models: Path) -> None:
    """Its pair could be released again."""
    publish(make_pipeline(one_hot("red", "green", "blue"), LogisticRegression()).fit(FRAME, IS_LARGE), FRAME, name="paint",
            repository=models)  # fmt: skip
    (models / "paint" / "predict" / "2" / "model.onnx").unlink()
    withdraw("paint", 2, repository=models)

    matrix = matrix_of(models)

    assert [(each.pair, each.serves) for each in matrix.releases] == [("1.1", "by default")]
    assert "3.2" in {each.pair for each in matrix.pairs}
    assert matrix.problems == ()


def report(*kinds: Any, **refused: str) -> Report:
    """An environment in which all bundles load but these, and the release agrees where both halves run."""
    bundles = [f"paint/{kind}/{version}" for kind, version in (("preprocess", 1), ("preprocess", 2), ("predict", 1))]
    trials = [Trial(name, refused.get(name.replace("/", "_"), "")) for name in bundles if name.split("/")[1] in kinds]
    releases = (Trial("paint/releases/0001-1.1", golden="agree"),) if len(kinds) == 2 else ()
    return Report({}, kinds, tuple(trials), releases)


def test_environments_that_run_one_half_each_are_combined(published: Path) -> None:
    """A pair has a verdict for each of preprocess with each of predict."""
    reports = {
        "old": report("preprocess", paint_preprocess_1="no"),
        "new": report("preprocess"),
        "predict": report("predict"),
    }
    agree = (Trial("paint/releases/0001-1.1", golden="agree"),)

    matrix = judge(Repository(published), reports, {"old + predict": agree, "new + predict": agree})

    assert reasons(matrix, "old + predict")["1.1"] == "no"
    assert reasons(matrix, "new + predict")["1.1"] == ""
    assert matrix.problems == ("old + predict: paint 1.1, release 1, which serves by default, is refused: no",)


def in_this_environment(models: Path) -> Any:
    """A `Take` that takes every step here, whatever the name of the environment is."""
    return lambda environment, step, before: take_step(Repository(models), step, before, Allowed())


def reports_of_halves(*environments: str) -> dict[str, Report]:
    """Those named p… run preprocessors, the others predictors; every bundle loads."""
    return {name: report("preprocess" if name.startswith("p") else "predict") for name in environments}


def test_the_whole_of_a_release_is_run_across_two_environments(models: Path) -> None:
    """Features are made in one, outputs of them in the other, and the answer in the first: it has to be the recorded one."""
    reports = reports_of_halves("p", "m")
    agrees = judge(Repository(models), reports, across(in_this_environment(models), ["p"], ["m"]))
    change_release(models, lambda golden: Golden(golden.inputs, tuple(shifted(each) for each in golden.outputs)))
    differs = judge(Repository(models), reports, across(in_this_environment(models), ["p"], ["m"]))

    assert reasons(agrees, "p + m")["1.1"] == ""
    assert agrees.problems == ()
    assert reasons(differs, "p + m")["1.1"].startswith('paint/releases/0001-1.1: output "probabilities" of golden sample')
    (problem,) = differs.problems
    assert problem.startswith("p + m: paint 1.1, release 1, which serves by default, is refused: paint/releases/0001-1.1: ")


def test_the_predictor_of_one_environment_is_run_on_the_features_of_the_other(models: Path) -> None:
    """What one environment computes otherwise spoils every whole that it is a half of, and no other."""
    here = in_this_environment(models)

    def take(environment: str, step: Step, before: Any) -> Any:
        made = here(environment, step, before)
        is_other = environment.endswith("other") and step != "answers"
        return [msgspec.structs.replace(each, tensors=tuple(map(shifted, each.tensors))) for each in made] if is_other else made

    names = ["p", "p other"], ["m", "m other"]
    matrix = judge(Repository(models), reports_of_halves(*names[0], *names[1]), across(take, *names))

    refused = {name: bool(verdict.reasons) for name, verdict in matrix.releases[0].verdicts.items()}
    assert refused == {"p + m": False, "p other + m": True, "p + m other": True, "p other + m other": True}


def test_a_release_that_was_not_run_across_two_environments_is_refused(published: Path) -> None:
    """It was recorded while the images were asked."""
    matrix = judge(Repository(published), reports_of_halves("p", "m"), {combine("p", "m"): ()})

    assert "recorded while the bundles were loaded" in reasons(matrix, "p + m")["1.1"]


def test_a_step_says_why_it_cannot_be_taken(models: Path) -> None:
    """And the steps after it pass the reason on, with the environment that it came from."""
    (models / "paint" / "predict" / "1" / "model.onnx").write_bytes(b"")
    here = in_this_environment(models)

    features = here("p", "features", ())
    outputs = here("m", "outputs", [msgspec.structs.replace(each, source="p") for each in features])
    answers = here("p", "answers", outputs)

    assert [(each.release, each.reason, each.source) for each in features] == [("paint/releases/0001-1.1", "", "")]
    assert "bytes as in manifest.json, got 0" in outputs[0].reason
    assert answers == outputs
    assert here("p", "answers", [Passed("paint/releases/0009-1.1")])[0].reason.endswith("meanwhile; run this again")


def test_environments_that_run_both_halves_stand_for_themselves(published: Path) -> None:
    """An environment may refuse what another one admits."""
    reports = {name: report("preprocess", "predict", **bad) for name, bad in {"a": {}, "b": {"paint_predict_1": "no"}}.items()}

    matrix = judge(Repository(published), reports)

    assert {name: verdict.reasons for name, verdict in matrix.releases[0].verdicts.items()} == {"a": (), "b": ("no",)}


def test_a_half_that_no_environment_runs_is_a_problem(published: Path) -> None:
    """A bundle that was not tried may not work."""
    matrix = judge(Repository(published), {"image": report("preprocess")})

    assert matrix.releases[0].verdicts == {}
    assert matrix.problems == ("image: no release can be checked, no environment runs predictors",)


def test_a_bundle_that_was_published_meanwhile_was_not_tried(published: Path) -> None:
    """Environments are asked one after the other; a bundle that an earlier one has not tried is not admitted there."""
    early = report("preprocess", "predict")
    early = msgspec.structs.replace(early, trials=early.trials[1:])

    assert reasons(judge(Repository(published), {HERE: early}))["1.1"] == "paint/preprocess/1: not published"


@pytest.mark.parametrize(
    ("missing", "kinds"),
    [
        ("onnxruntime", ["preprocess"]),
        ("sklearn", ["predict"]),
        ("numpy", []),
        ("onnxruntime sklearn skops scipy pandas joblib PIL", ["preprocess"]),
    ],
)
@pytest.mark.heavy
def test_an_image_tries_the_halves_that_it_has_the_library_for(published: Path, missing: str, kinds: list[str]) -> None:
    """As a program of its own, which needs neither the commands' packages nor the other half's."""
    block = f"import sys; sys.modules.update(dict.fromkeys([*{missing.split()!r}, 'typer', 'rich', 'grpc', 'pydantic']))"
    code = f"{block}; from splitserve.checks.examination import main; sys.exit(main(*sys.argv[1:]))"

    printed = subprocess.run([sys.executable, "-c", code, published], check=True, capture_output=True).stdout
    found = msgspec.json.decode(printed, type=Report)

    assert list(found.kinds) == kinds
    assert {trial.name.split("/")[1] for trial in found.trials} == set(kinds)
    assert {trial.golden for trial in found.trials} <= {"agree"}


# The command


def run(*arguments: Any) -> Any:
    return run_command("matrix", *arguments)


def test_the_command_prints_tables_and_each_reason_once(models: Path) -> None:
    """A cell has the number of its reason."""
    (models / "paint" / "predict" / "1" / "model.onnx").write_bytes(b"")

    result = run("--repository", models)

    lines = [line.split() for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert ["paint", "1", "1.1", "by", "default", "refused", "(1)"] in lines
    assert ["paint", "2.1", "refused", "(1)"] in lines
    assert result.stdout.count("bytes as in manifest.json, got 0") == 1
    assert result.stderr.startswith(
        "not deployable: here: paint 1.1, release 1, which serves by default, is refused: paint/predict/1"
    )


def test_the_command_exits_0_where_only_pairs_without_a_release_are_refused(published: Path) -> None:
    """So that a new half can be published before its partner."""
    result = run("--repository", published)

    assert (result.exit_code, result.stderr) == (0, "")
    assert "golden samples agree" in result.stdout


def test_the_command_gives_json_and_markdown(published: Path) -> None:
    """The one for programs, the other for a page of a CI."""
    as_json = run("--repository", published, "--json")
    as_markdown = run("--repository", published, "--markdown")

    assert msgspec.json.decode(as_json.stdout, type=Matrix) == matrix_of(published)
    assert "| paint | 1 | 1.1 | by default | served |" in as_markdown.stdout.splitlines()


@pytest.mark.parametrize(("folder", "message"), [("nowhere", "no such folder"), ("", "no models found in")])
def test_the_command_fails_without_a_repository(tmp_path: Path, folder: str, message: str) -> None:
    """A gate that checks nothing must not pass."""
    result = run("--repository", tmp_path / folder)

    assert result.exit_code == 1
    assert message in result.stderr


def test_a_broken_route_is_reported_in_one_line(models: Path) -> None:
    """With its model; everything else is still tried."""
    (models / "paint" / "route.json").write_text("[]")

    result = run("--repository", models)

    assert result.exit_code == 1
    assert result.stderr.startswith("not deployable: paint: route.json: ")
    assert "served" in result.stdout


def test_the_command_reads_the_same_sources_as_services(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository on a web server, the folder of one model."""
    monkeypatch.setenv("MODEL_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(published, tmp_path / "models"))
    write_index(folder, build_index(Repository(folder))[0])
    with FileServer(folder).running() as server:
        fetched = run("--repository", server.url, "--json")
    of_one = run("--repository", folder / "paint", "--json")

    assert (fetched.exit_code, of_one.exit_code) == (0, 0), fetched.output
    expected = matrix_of(published)
    for printed in (fetched.stdout, of_one.stdout):
        found = msgspec.json.decode(printed, type=Matrix)
        assert (found.releases, found.pairs) == (expected.releases, expected.pairs)
        assert set(found.environments[HERE].trials) == set(expected.environments[HERE].trials)


def test_images_need_a_folder(docker: Path) -> None:
    """They get it mounted."""
    result = run("--repository", "http://127.0.0.1:1/models", "--image", "first", "--docker", docker)

    assert result.exit_code == 1
    assert result.stderr == "--image mounts the repository: expected a folder, got a URL; copy the repository to a folder\n"


@pytest.mark.parametrize("where", ["here", pytest.param("images", marks=pytest.mark.heavy)])
def test_what_services_refuse_for_its_signature_the_matrix_refuses(
    models: Path, docker: Path, tmp_path: Path, where: str
) -> None:
    """If it is given the key that they are given. The reports of images are combined."""
    keys = make_keys(tmp_path)
    repository = Repository(models)
    for key in (BundleKey("paint", "preprocess", 1), BundleKey("paint", "preprocess", 2)):
        load_bundle(repository, key, Signer(keys.private).sign)
    images = ["--image", "first", "--image", "second", "--docker", docker] if where == "images" else []

    without_key = run("--repository", models)
    half_signed = run("--repository", models, "--signature-key", keys.public, "--json", *images)
    load_bundle(repository, BundleKey("paint", "predict", 1), Signer(keys.private).sign)
    unsigned_release = run("--repository", models, "--signature-key", keys.public, *images)
    Signer(keys.private).sign(repository.open_release(ReleaseKey("paint", 1, Pair(1, 1))))
    signed = run("--repository", models, "--signature-key", keys.public, "--markdown", *images)
    no_key = run("--repository", models, "--signature-key", tmp_path / "nowhere")

    assert [each.exit_code for each in (without_key, half_signed, unsigned_release, signed, no_key)] == [0, 1, 1, 0, 1]
    (verdict,) = msgspec.json.decode(half_signed.stdout, type=Matrix).pairs[0].verdicts.values()
    assert verdict.reasons == ('paint/predict/1: not signed; "splitserve sign" adds model.sig',)
    assert 'paint/releases/0001-1.1: not signed; "splitserve sign" adds model.sig' in unsigned_release.stderr
    assert no_key.stderr.endswith("nowhere: No such file or directory\n")
    if where == "images":  # a column for each image's bundles, one for both together of the pairs
        assert "| bundle | made with | first | second |" in signed.stdout
        assert "| model | release | pair | serves | first + second |" in signed.stdout
        assert "| golden samples agree | - |" in signed.stdout
        assert "| - | golden samples agree |" in signed.stdout


def test_the_runtime_of_transforms_is_shown(models: Path) -> None:
    """Services that use compiled forms only refuse bundles without one."""
    manifest = models / "paint" / "preprocess" / "1" / "manifest.json"
    manifest.write_text(
        re.sub(r'"compiled": {.*?}', '"compiled": {"reason": "no such operator"}', manifest.read_text(), flags=re.S)
    )
    (models / "paint" / "preprocess" / "1" / "pipeline.onnx").unlink(missing_ok=True)
    content = json.loads(manifest.read_text())
    content["files"].pop("pipeline.onnx", None)
    manifest.write_text(json.dumps(content))

    assert "no such operator" not in run("--repository", models).output
    assert "no compiled form: no such operator" in run("--repository", models, "--runtime", "onnx").output


FAKE_DOCKER = """#!{python}
import re, runpy, sys
mount = next(word for word in sys.argv if word.startswith("type=bind"))
at = sys.argv.index("-m")
image, (module, *arguments) = sys.argv[at - 1], sys.argv[at + 1 :]
assert "readonly" in mount and sys.argv[sys.argv.index("--network") + 1] == "none"
if image == "missing":
    sys.exit("Unable to find image 'missing:latest' locally")
arguments[arguments.index("/models")] = re.search("source=([^,]*)", mount)[1]
sys.argv[1:] = arguments
sys.modules[{{"first": "onnxruntime", "second": "sklearn"}}.get(image, "nothing")] = None
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""Runs what would be run in an image, with this environment less a library."""


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    program = tmp_path / "docker"
    program.write_text(FAKE_DOCKER.format(python=sys.executable))
    program.chmod(0o755)
    return program


@pytest.mark.heavy
def test_the_whole_of_a_release_is_run_across_images(models: Path, docker: Path) -> None:
    """Each bundle agrees in its image; the release does not."""
    change_release(models, lambda golden: Golden(golden.inputs, tuple(shifted(each) for each in golden.outputs)))

    result = run("--repository", models, "--image", "first", "--image", "second", "--docker", docker)

    assert result.exit_code == 1
    assert "not deployable: first + second: paint 1.1, release 1, which serves by default, is refused" in result.stderr
    assert 'output "probabilities" of golden sample' in result.stderr


def test_an_image_that_cannot_run_is_named(published: Path, docker: Path) -> None:
    """With docker's last words."""
    missing = run("--repository", published, "--image", "missing", "--docker", docker)
    nothing = run("--repository", published, "--image", "first", "--docker", docker.with_name("nothing"))

    assert (missing.exit_code, nothing.exit_code) == (1, 1)
    assert missing.stderr == "missing: Unable to find image 'missing:latest' locally\n"
    assert nothing.stderr.endswith("nothing cannot be run: No such file or directory\n")
