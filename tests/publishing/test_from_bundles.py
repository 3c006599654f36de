"""Halves that were published apart are released once they are proven together and mean the same."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    StandardScaler,
)

from splitserve import PublishError, publish, publish_predictor, publish_preprocessor, release, rollback, withdraw
from splitserve.arrays import from_array, to_array
from splitserve.publishing import propose
from splitserve.publishing.convert import to_onnx
from splitserve.publishing.meaning import probes
from splitserve.repository.folder import Repository
from splitserve.repository.release import History, Release
from splitserve.repository.release_log import MakeRecord
from splitserve.repository.releases import ReleaseReader
from tests.folders import MadeOnce

IRIS, SPECIES = load_iris(return_X_y=True)
RANDOM = np.random.default_rng(0)
TABLE = pd.DataFrame(
    {"size": RANDOM.normal(10, 3, 80), "age": RANDOM.normal(50, 9, 80), "colour": RANDOM.choice(["red", "blue"], 80)}
)
TABLE.loc[::9, "age"] = np.nan
TARGET = TABLE["size"] * 2 + (TABLE["colour"] == "red")


def history(root: Path, model: str = "m") -> History:
    return ReleaseReader(Repository(root)).history(model)


def fitted(*steps: Any, rows: Any = IRIS) -> Pipeline:
    return make_pipeline(*steps).fit(rows)


def table_transforms(**imputer: Any) -> Pipeline:
    return make_pipeline(
        make_column_transformer(
            (make_pipeline(SimpleImputer(**imputer), StandardScaler()), ["size", "age"]), (OneHotEncoder(), ["colour"])
        )
    ).fit(TABLE)


@pytest.fixture
def models(made_once: MadeOnce, tmp_path: Path) -> Path:
    """A model that is released as 1.1."""
    return Path(shutil.copytree(made_once(publish_first), tmp_path, dirs_exist_ok=True))


def publish_first(repository: Path) -> None:
    publish(make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES), IRIS, name="m", repository=repository)


def test_a_refit_with_the_same_numbers_is_released(models: Path) -> None:
    publish_preprocessor(fitted(StandardScaler()), IRIS, name="m", repository=models)

    record = release("m", "2.1", repository=models)

    assert (record.sequence, str(record.pair), record.manifest.proven, record.manifest.accepted) == (2, "2.1", "halves", ())
    current = history(models).current()
    assert current is not None
    assert str(current.pair) == "2.1"


OTHER_FITS: dict[str, Callable[[], Pipeline]] = {
    "other units": lambda: fitted(StandardScaler(), rows=IRIS * 10),
    "another scaler": lambda: fitted(MinMaxScaler()),
    "columns swapped": lambda: fitted(FunctionTransformer(lambda rows: rows), StandardScaler(), rows=IRIS[:, ::-1]),
}


@pytest.mark.parametrize("fit", [OTHER_FITS["other units"], OTHER_FITS["another scaler"]], ids=["other units", "another scaler"])
def test_a_refit_with_other_numbers_is_refused(models: Path, fit: Callable[[], Pipeline]) -> None:
    """The shapes agree, so only the numbers tell."""
    publish_preprocessor(fit(), IRIS, name="m", repository=models)

    with pytest.raises(PublishError, match=r"4 features differ .*: .* in training, .* now .*--accept-changed-features"):
        release("m", "2.1", repository=models)

    assert [str(each.pair) for each in history(models).records] == ["1.1"]


def test_changed_features_are_released_if_accepted_and_recorded(models: Path) -> None:
    publish_preprocessor(OTHER_FITS["another scaler"](), IRIS, name="m", repository=models)

    record = release("m", "2.1", repository=models, accept_changed_features=True)

    assert record.manifest.accepted == ("changed features",)


def test_a_refitted_pca_is_refused(tmp_path: Path) -> None:
    pipeline = make_pipeline(PCA(2), LogisticRegression()).fit(IRIS, SPECIES)
    publish(pipeline, IRIS, name="m", repository=tmp_path)
    publish_preprocessor(fitted(PCA(2), rows=IRIS[:100]), IRIS, name="m", repository=tmp_path)

    with pytest.raises(PublishError, match="features differ"):
        release("m", "2.1", repository=tmp_path)


def test_other_bin_edges_are_refused(tmp_path: Path) -> None:
    """Few rows of training lie between the edges: rows made from both fits show the difference."""

    def bins(rows: Any) -> KBinsDiscretizer:
        return KBinsDiscretizer(3, encode="ordinal", strategy="uniform").fit(rows)

    pipeline = Pipeline([("bins", bins(IRIS)), ("model", Ridge().fit(bins(IRIS).transform(IRIS), SPECIES))])
    publish(pipeline, IRIS, name="m", repository=tmp_path)
    wider = np.vstack([IRIS, IRIS.max(axis=0) * 1.02])
    publish_preprocessor(make_pipeline(bins(wider)), IRIS, name="m", repository=tmp_path)

    with pytest.raises(PublishError, match="differ"):
        release("m", "2.1", repository=tmp_path)


def test_other_imputer_values_are_refused_though_no_row_of_training_misses_the_column(tmp_path: Path) -> None:
    whole = TABLE.fillna(50.0)
    first = table_transforms(strategy="mean")
    pipeline = Pipeline([*first.steps, ("model", Ridge().fit(first.transform(whole), TARGET))])
    publish(pipeline, whole, name="m", repository=tmp_path)
    publish_preprocessor(table_transforms(strategy="constant", fill_value=-1.0), whole, name="m", repository=tmp_path)

    with pytest.raises(PublishError, match="differ"):
        release("m", "2.1", repository=tmp_path)


def test_a_preprocessor_of_other_rows_is_refused(models: Path) -> None:
    publish_preprocessor(
        make_column_transformer((StandardScaler(), ["a", "b", "c", "d"])).fit(frame := pd.DataFrame(IRIS, columns=list("abcd"))),
        frame,
        name="m",
        repository=models,
    )

    with pytest.raises(PublishError, match="the raw rows"):
        release("m", "2.1", repository=models)


def predictor_of(scaler: Any) -> bytes:
    model: bytes = to_onnx(
        LogisticRegression().fit(scaler.transform(IRIS), SPECIES), 4, input_name="features", precision="FP32"
    ).SerializeToString()
    return model


def test_unknown_features_need_explicit_acceptance(tmp_path: Path) -> None:
    scaler = fitted(StandardScaler())
    publish_preprocessor(scaler, IRIS, name="m", repository=tmp_path)
    publish_predictor(predictor_of(scaler), scaler.transform(IRIS).astype(np.float32), name="m", repository=tmp_path)

    with pytest.raises(PublishError, match=r"it is unknown .*--accept-unknown-features"):
        release("m", "1.1", repository=tmp_path)
    assert release("m", "1.1", repository=tmp_path, accept_unknown_features=True).manifest.accepted == ("unknown features",)


def test_known_features_need_no_acceptance(tmp_path: Path) -> None:
    scaler = fitted(StandardScaler())
    publish_preprocessor(scaler, IRIS, name="m", repository=tmp_path)
    features = scaler.transform(IRIS).astype(np.float32)
    publish_predictor(predictor_of(scaler), features, name="m", repository=tmp_path, trained_on=scaler, rows=IRIS)

    assert release("m", "1.1", repository=tmp_path).sequence == 1


def test_rows_that_are_not_those_of_the_sample_are_refused(tmp_path: Path) -> None:
    scaler = fitted(StandardScaler())
    with pytest.raises(PublishError, match="rows: expected the 150 that the sample inputs were made from, got 10"):
        publish_predictor(
            predictor_of(scaler), scaler.transform(IRIS).astype(np.float32), name="m", repository=tmp_path, rows=IRIS[:10]
        )


def test_a_proposal_shows_what_would_change(models: Path) -> None:
    """Against the release that serves now, on its golden rows."""
    other = LogisticRegression(C=0.001).fit(StandardScaler().fit_transform(IRIS), SPECIES)
    model = to_onnx(other, 4, input_name="features", precision="FP32").SerializeToString()
    features = StandardScaler().fit_transform(IRIS).astype(np.float32)
    publish_predictor(
        model, features, name="m", repository=models, labels=[0, 1, 2], trained_on=fitted(StandardScaler()), rows=IRIS
    )

    proposal = propose("m", "1.2", repository=models)

    assert proposal.features == ()
    assert proposal.current is not None
    assert proposal.current.release.sequence == 1
    assert proposal.current.n_labels_changed > 0
    assert 0.1 < proposal.current.changes["probabilities"] < 1
    assert len(history(models).records) == 1, "nothing is written"


@pytest.mark.parametrize("pair", ["1", "x", "1.1.1", "", 1.1, None])
def test_an_invalid_pair_is_named(models: Path, pair: Any) -> None:
    """A number is none: 1.10 would be 1.1."""
    with pytest.raises(PublishError, match="expected the text K.M"):
        release("m", pair, repository=models)


def test_a_sequence_number_is_a_number(models: Path) -> None:
    with pytest.raises(PublishError, match="release '1': expected a sequence number; splitserve releases m lists them"):
        withdraw("m", "1", repository=models)  # type: ignore[arg-type]


def test_a_missing_half_is_named(models: Path) -> None:
    with pytest.raises(PublishError, match="m/predict/7"):
        release("m", "1.7", repository=models)


def test_rollback_releases_the_previous_pair(models: Path) -> None:
    publish(make_pipeline(MinMaxScaler(), LogisticRegression()).fit(IRIS, SPECIES), IRIS, name="m", repository=models)

    record = rollback("m", repository=models)

    assert (record.sequence, str(record.pair), record.manifest.rolls_back) == (3, "1.1", 2)
    with pytest.raises(PublishError, match=r"no release before 3 \(1.1\) can be rolled back to"):
        rollback("m", repository=models)


@pytest.mark.parametrize("change", ["a withdrawal", "a release"])
def test_a_rollback_counts_what_was_recorded_while_it_was_prepared(
    models: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """It does not bring back a release that was withdrawn, nor roll back one that nobody has seen."""
    pipeline = make_pipeline(MinMaxScaler(), LogisticRegression()).fit(IRIS, SPECIES)
    publish(pipeline, IRIS, name="m", repository=models)
    append = Repository.append

    def others_first(repository: Repository, model: str, make: MakeRecord) -> Release:
        monkeypatch.setattr(Repository, "append", append)
        if change == "a release":
            publish(pipeline, IRIS, name="m", repository=models)
        else:
            withdraw("m", 1, repository=models)
        return append(repository, model, make)

    monkeypatch.setattr(Repository, "append", others_first)

    with pytest.raises(PublishError, match=r"have changed since release 2 was to be rolled back to 1 \(1.1\)"):
        rollback("m", repository=models)

    assert [each.manifest.rolls_back for each in history(models).records] == [0, 0, 0]


def test_a_release_is_withdrawn_once(models: Path) -> None:
    publish_preprocessor(fitted(StandardScaler()), IRIS, name="m", repository=models)
    release("m", "2.1", repository=models)

    withdraw("m", 2, repository=models)

    current = history(models).current()
    assert current is not None
    assert current.sequence == 1
    with pytest.raises(PublishError, match="release 2 is withdrawn already"):
        withdraw("m", 2, repository=models)
    with pytest.raises(PublishError, match="release 9 does not exist"):
        withdraw("m", 9, repository=models)


def test_a_route_that_pins_another_pair_blocks_releases(models: Path) -> None:
    """What is recorded would not serve; the message names the file."""
    publish_preprocessor(fitted(StandardScaler()), IRIS, name="m", repository=models)
    (models / "m" / "route.json").write_text('{"pairs": [{"pair": "1.1"}]}')

    with pytest.raises(PublishError, match=r"route.json pins 1.1; change or remove the route first"):
        release("m", "2.1", repository=models)
    with pytest.raises(PublishError, match=r"route.json pins 1.1; change or remove the route first"):
        withdraw("m", 1, repository=models)


def test_probes_show_missing_unseen_and_extreme_values() -> None:
    rows = (from_array("size", np.array([[1.0], [3.0]])), from_array("colour", np.array([["red"], ["blue"]], dtype=object)))

    seen = [{tensor.name: to_array(tensor)[0, 0] for tensor in probe} for probe in probes(rows)]

    sizes = [probe["size"] for probe in seen]
    assert np.isnan(sizes).any()
    assert {-1.0, 1.0, 2.0, 3.0, 5.0} <= set(sizes)
    assert {b"", b"red"} <= {probe["colour"] for probe in seen}


def test_numbers_of_categories_in_another_order_are_refused(tmp_path: Path) -> None:
    colours = TABLE[["colour"]]

    def encoder(categories: list[str]) -> OrdinalEncoder:
        return OrdinalEncoder(categories=[categories]).fit(colours)

    first = encoder(["blue", "red"])
    publish(
        Pipeline([("code", first), ("model", Ridge().fit(first.transform(colours), TARGET))]),
        colours,
        name="m",
        repository=tmp_path,
    )
    publish_preprocessor(make_pipeline(encoder(["red", "blue"])), colours, name="m", repository=tmp_path)

    with pytest.raises(PublishError, match="differ"):
        release("m", "2.1", repository=tmp_path)
