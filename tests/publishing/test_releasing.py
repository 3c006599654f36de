"""A pair serves once it is released: written last, whole or not at all, proven as a whole."""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from splitserve.publishing import PublishError, publish, publish_onnx, publish_preprocessor
from splitserve.publishing.convert import Names
from splitserve.publishing.from_bundles import withdraw
from splitserve.publishing.halves import PredictorHalf, PreprocessorHalf, PublishOptions
from splitserve.publishing.predictor_half import ModelSamples, predictor_half
from splitserve.publishing.preprocessor_half import FeatureForm, preprocessor_half
from splitserve.publishing.releasing import PRINCIPAL_VARIABLE, labels_of, withdraw_record, write_released
from splitserve.repository import release_log
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BOUNDS, GOLDEN_FILE, MANIFEST_FILE, BundleError
from splitserve.repository.release import Compared, History, Release, ReleaseKey, decode
from splitserve.runtimes import predictor, preprocessor
from splitserve.runtimes.release import WholeRelease, check_answer, golden_of

IRIS, SPECIES = load_iris(return_X_y=True)
FITTED = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)


def read(root: Path, key: ReleaseKey) -> tuple[Release, bytes]:
    folder = root / key.model / "releases" / key.folder_name
    data = (folder / MANIFEST_FILE).read_bytes()
    golden = folder / GOLDEN_FILE
    return Release(decode(data, key), "0" * 64), golden.read_bytes() if golden.exists() else b""


def history(root: Path, model: str) -> History:
    return History(read(root, key)[0] for key in release_log.listing(root, model))


def whole(root: Path, release: Release) -> WholeRelease:
    repository, pair = Repository(root), release.pair
    return WholeRelease(
        preprocessor.load(repository.open(BundleKey(release.key.model, "preprocess", pair.preprocessor))),
        predictor.load(repository.open(BundleKey(release.key.model, "predict", pair.predictor))),
    )


def test_publish_releases_the_pair(tmp_path: Path) -> None:
    """Digests of both halves, what was compared, and golden samples of the whole."""
    published = publish(FITTED, IRIS, name="iris", repository=tmp_path)

    [key] = release_log.listing(tmp_path, "iris")
    release, data = read(tmp_path, key)
    bundles = [Repository(tmp_path).open(BundleKey("iris", kind, 1)) for kind in ("preprocess", "predict")]  # type: ignore[arg-type]
    assert (str(key.pair), key.sequence) == (published.pair, published.sequence) == ("1.1", 1)
    assert [release.manifest.preprocessor, release.manifest.predictor] == [bundle.manifest_sha256 for bundle in bundles]
    n_hard = sum(published.hard_rows.values())
    assert (release.manifest.proven, release.manifest.compared.rows) == ("pipeline", 150 + n_hard)
    assert release.manifest.is_row_wise
    assert {spec.name for spec in release.manifest.outputs} == {"label", "probabilities"}
    golden = golden_of(release.manifest, data)
    check_answer(release.manifest, golden, whole(tmp_path, release).infer(golden.inputs))


def test_a_record_says_who_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the environment says, else the user and the machine; withdrawals too."""
    monkeypatch.setenv(PRINCIPAL_VARIABLE, "release pipeline 7")
    publish(FITTED, IRIS, name="iris", repository=tmp_path)
    monkeypatch.delenv(PRINCIPAL_VARIABLE)
    withdraw("iris", 1, repository=tmp_path)

    first, second = (read(tmp_path, key)[0].manifest.recorded_by for key in release_log.listing(tmp_path, "iris"))

    assert first == "release pipeline 7"
    assert second.endswith(f"@{socket.gethostname()}"[-100:])


def test_tolerances_of_a_release_are_fixed_bounds(tmp_path: Path) -> None:
    """Never learnt from a difference that was seen."""
    publish(FITTED, IRIS, name="iris", repository=tmp_path)

    [key] = release_log.listing(tmp_path, "iris")
    manifest = read(tmp_path, key)[0].manifest

    assert manifest.tolerances.keys() == {"probabilities"}
    assert manifest.tolerances["probabilities"].atol <= BOUNDS["FP32"]


def test_an_onnx_model_without_transforms_is_released(tmp_path: Path) -> None:
    from tests.system.models import softmax_model

    publish_onnx(softmax_model(3), np.eye(3, dtype=np.float32), name="m", repository=tmp_path)

    assert [str(key) for key in release_log.listing(tmp_path, "m")] == ["m/releases/0001-1.1"]


def test_halves_that_were_published_apart_are_not_released(tmp_path: Path) -> None:
    publish_preprocessor(StandardScaler().fit(IRIS), IRIS, name="m", repository=tmp_path)

    assert release_log.listing(tmp_path, "m") == []


def centred(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(axis=0)


def test_a_pipeline_whose_answers_depend_on_other_rows_is_refused(tmp_path: Path) -> None:
    """Services merge the requests of strangers."""
    pipeline = make_pipeline(FunctionTransformer(centred), Ridge()).fit(IRIS, IRIS[:, 0])

    with pytest.raises(PublishError, match=r"depends on the other rows .*row_wise=False"):
        publish(pipeline, IRIS, name="m", repository=tmp_path, trusted_modules=[__name__])

    assert list(tmp_path.iterdir()) == []


def test_models_with_dependent_rows_are_published_if_declared(tmp_path: Path) -> None:
    """Both halves and the release carry the flag, so that nothing merges its requests."""
    pipeline = make_pipeline(FunctionTransformer(centred), Ridge()).fit(IRIS, IRIS[:, 0])

    publish(pipeline, IRIS, name="m", repository=tmp_path, trusted_modules=[__name__], row_wise=False)

    [key] = release_log.listing(tmp_path, "m")
    assert not read(tmp_path, key)[0].manifest.is_row_wise
    for kind in ("preprocess", "predict"):
        assert not Repository(tmp_path).open(BundleKey("m", kind, 1)).manifest.is_row_wise  # type: ignore[arg-type]


def test_halves_with_the_labels_in_another_order_do_not_fit(halves: tuple[PreprocessorHalf, PredictorHalf]) -> None:
    import msgspec

    first, second = (half.manifest for half in halves)
    assert labels_of(first, second) == ("0", "1", "2")
    with pytest.raises(BundleError, match="the preprocessor has the labels 1, 0, 2, the predictor 0, 1, 2"):
        labels_of(msgspec.structs.replace(first, labels=("1", "0", "2")), second)


def test_a_withdrawn_release_does_not_serve_any_more(tmp_path: Path) -> None:
    publish(FITTED, IRIS, name="iris", repository=tmp_path)
    publish(FITTED, IRIS, name="iris", repository=tmp_path)
    current = history(tmp_path, "iris").current()
    assert current is not None

    withdraw_record(Repository(tmp_path), current)

    left = history(tmp_path, "iris").current()
    assert left is not None
    assert (current.sequence, left.sequence) == (2, 1)


@pytest.fixture(scope="module")
def halves() -> tuple[PreprocessorHalf, PredictorHalf]:
    options = PublishOptions(name="iris")
    first = preprocessor_half(FITTED[:-1], IRIS, FeatureForm(precision="FP32", all_as_floats=True), options)
    from splitserve.arrays import to_array
    from splitserve.publishing.convert import to_onnx

    features = {tensor.name: to_array(tensor) for tensor in first.golden.outputs}
    model = to_onnx(FITTED[-1], 4, input_name="features", precision="FP32")
    return first, predictor_half(model.SerializeToString(), ModelSamples(features), options, names=Names(labels=("0", "1", "2")))


def write_both(root: Path, halves: tuple[PreprocessorHalf, PredictorHalf]) -> Release:
    return write_released(Repository(root), *halves, version=None, proven="pipeline", compared=Compared(150))


@pytest.mark.parametrize("is_recorded", [True, False])
def test_an_error_after_the_release_was_recorded_leaves_its_halves(
    tmp_path: Path, halves: tuple[PreprocessorHalf, PredictorHalf], monkeypatch: pytest.MonkeyPatch, is_recorded: bool
) -> None:
    """A store can fail after it has written: the release serves, and needs what it names."""
    append = Repository.append

    def fail(repository: Repository, model: str, make: release_log.MakeRecord) -> Release:
        if is_recorded:
            append(repository, model, make)
        raise BundleError("the connection was lost")

    monkeypatch.setattr(Repository, "append", fail)

    with pytest.raises(PublishError, match="the connection was lost"):
        write_both(tmp_path, halves)

    assert len(list(Repository(tmp_path).bundles())) == (2 if is_recorded else 0)


_WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.truncate", "fcntl.flock")


def killed_at(number: int, root: Path, halves: tuple[PreprocessorHalf, PredictorHalf]) -> bool:
    """Publish in a process that is killed before its n-th operation on files; whether it had so many."""
    pid = os.fork()
    if pid == 0:
        left = iter(range(number))

        def count() -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sync = os.fsync
        os.fsync = lambda handle: (count(), sync(handle))[1]  # type: ignore[assignment]
        sys.addaudithook(lambda event, arguments: count() if event in _WRITES and str(root) in str(arguments[0]) else None)
        try:
            write_both(root, halves)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def kills(tmp_path: Path, halves: tuple[PreprocessorHalf, PredictorHalf]) -> Iterator[Path]:
    """A repository with a release, in which the next publication was killed, for each place where it can be."""
    for number in range(1000):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "before", root)
        if not killed_at(number, root, halves):
            return
        yield root


@pytest.mark.heavy
def test_a_publisher_killed_at_any_point_leaves_the_old_or_the_new_state(
    tmp_path: Path, halves: tuple[PreprocessorHalf, PredictorHalf]
) -> None:
    """And the next publication works."""
    write_both(tmp_path / "before", halves)
    sequences = []
    for root in kills(tmp_path, halves):
        current = history(root, "iris").current()
        assert current is not None
        golden = golden_of(current.manifest, read(root, current.key)[1])
        check_answer(current.manifest, golden, whole(root, current).infer(golden.inputs))
        sequences.append(current.sequence)

        following = write_both(root, halves)

        newest = history(root, "iris").current()
        assert newest is not None
        assert newest.sequence == following.sequence > current.sequence
        shutil.rmtree(root)

    assert sequences == sorted(sequences)
    assert {1, 2} == set(sequences)
    assert len(sequences) > 30, "the places where it can be killed"
