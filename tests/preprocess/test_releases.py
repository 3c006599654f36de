"""What serves: pairs that a release names, whose halves are those of the release, and whose golden samples agree."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from structlog.testing import capture_logs

from predict_service.service import PredictService
from preprocess_service.service import PreprocessService
from splitserve import publish, publish_predictor, publish_preprocessor, release
from splitserve.arrays import from_array, to_array
from splitserve.catalogue import STILL_LOADING
from splitserve.errors import NotFound, Unavailable
from splitserve.oip import classification
from splitserve.oip.messages import EXPECTED_MANIFEST, LOADING, READY, InferRequest, InferResponse, ModelState, RequestedOutput
from splitserve.publishing.from_bundles import withdraw
from splitserve.repository import golden as goldens
from splitserve.repository import manifest as manifests
from splitserve.repository import release_log
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import Tolerance
from splitserve.repository.release import ReleaseKey, encode
from splitserve.runtimes import predictor as predictors
from splitserve.runtimes import preprocessor as preprocessors
from splitserve.server.metrics import Metrics, StageMetrics
from splitserve.server.store import VersionStore
from splitserve.telemetry.families import GOLDEN_ERROR
from splitserve.versions import Pair
from tests.system.models import affine_model

ROWS = np.random.default_rng(0).normal(loc=5, size=(40, 3))
TARGETS = ROWS @ [1.0, 2.0, 3.0] + 100
RELEASE = ReleaseKey("m", 1, Pair(1, 1))


class Services:
    """Both stages over a repository, as one process has them."""

    def __init__(self, root: Path, executor: Executor, *, allow_unreleased_pairs: bool = False, **options: Any) -> None:
        stores: dict[str, Any] = {"withdrawal_grace_s": 3600, "allow_unreleased_pairs": allow_unreleased_pairs}
        self.predictors = VersionStore(Repository(root), "predict", predictors.load, **stores)
        self.preprocessors = VersionStore(Repository(root), "preprocess", preprocessors.load, **stores)
        self.predict = PredictService(self.predictors, executor)
        self.service = PreprocessService(
            self.preprocessors, self.predict, executor, allow_unreleased_pairs=allow_unreleased_pairs, **options
        )

    async def refresh(self) -> PreprocessService:
        """Refresh predict, then preprocess."""
        await self.predictors.refresh()
        await self.preprocessors.refresh()
        await self.service.refresh()
        return self.service


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def services(tmp_path: Path, executor: Executor) -> Services:
    return Services(tmp_path, executor)


def publish_model(root: Path, scaler: Any = None, *, name: str = "m") -> None:
    publish(make_pipeline(scaler or StandardScaler(), Ridge(alpha=1e-3)).fit(ROWS, TARGETS), ROWS, name=name, repository=root)


def request(version: str = "", n_rows: int = 2) -> InferRequest:
    return InferRequest("m", (from_array("features", ROWS[:n_rows]),), version=version)


def answer(response: InferResponse) -> np.ndarray:
    return to_array(response.outputs[0]).ravel()


async def state_of(service: PreprocessService, version: str = "1.1") -> ModelState:
    return next(state for state in await service.index() if state.version == version)


async def test_a_model_of_which_only_releases_are_there_is_unavailable(services: Services, tmp_path: Path) -> None:
    """After a restart in the middle of a copy: the model exists, so a request is to be sent again, and not NOT_FOUND."""
    publish_model(tmp_path)
    for kind in ("preprocess", "predict"):
        shutil.move(tmp_path / "m" / kind, tmp_path / "away" / kind)

    service = await services.refresh()
    with pytest.raises(Unavailable, match="m/preprocess/1: not published"):
        await service.infer(request())
    for kind in ("preprocess", "predict"):
        shutil.move(tmp_path / "away" / kind, tmp_path / "m" / kind)
    service = await services.refresh()

    np.testing.assert_allclose(answer(await service.infer(request())), TARGETS[:2], rtol=1e-3)


async def test_a_model_of_which_only_withdrawn_releases_are_there_is_unavailable(services: Services, tmp_path: Path) -> None:
    """Requests that name no version never get NOT_FOUND for a model that the repository has."""
    publish_model(tmp_path)
    withdraw("m", 1, repository=tmp_path)
    for kind in ("preprocess", "predict"):
        shutil.rmtree(tmp_path / "m" / kind)

    service = await services.refresh()

    with pytest.raises(Unavailable, match="it has no release"):
        await service.infer(request())


async def test_a_pair_that_is_not_ready_says_its_release(services: Services, tmp_path: Path) -> None:
    """So that `splitserve health` names the release that is refused."""
    publish_model(tmp_path)
    recorded = Repository(tmp_path).open_release(RELEASE)
    shutil.rmtree(tmp_path / "m" / "predict")

    state = await state_of(await services.refresh())

    assert state.state == "UNAVAILABLE"
    assert state.properties["release_sequence"] == "1"
    assert state.properties["release_digest"] == recorded.manifest_sha256


async def test_what_was_published_serves_and_says_what_it_is(services: Services, tmp_path: Path) -> None:
    """Its release is in the index and in the metadata, by sequence number and digest."""
    publish_model(tmp_path)

    service = await services.refresh()
    response = await service.infer(request())
    metadata = await service.metadata("m")
    state = await state_of(service)

    recorded = Repository(tmp_path).open_release(RELEASE)
    np.testing.assert_allclose(answer(response), TARGETS[:2], rtol=1e-3)
    assert metadata.properties["default"] == "1.1"
    assert metadata.properties["release_sequence"] == "1"
    assert metadata.properties["release_digest"] == recorded.manifest_sha256
    assert state.properties == {"default": "true", "release_sequence": "1", "release_digest": recorded.manifest_sha256}
    assert await service.not_ready_reason() == ""


async def test_metadata_says_what_the_columns_are_and_classification_answers_with_it(services: Services, tmp_path: Path) -> None:
    """A list of classes for one target; with several targets, a list for each output."""
    kinds = np.array(["cat", "dog"])[(TARGETS.ravel() > np.median(TARGETS)).astype(int)]
    one = make_pipeline(DecisionTreeClassifier(max_depth=1)).fit(ROWS, kinds)
    several = make_pipeline(DecisionTreeClassifier(max_depth=1)).fit(ROWS, np.c_[kinds, kinds])
    publish(one, ROWS, name="one", repository=tmp_path)
    publish(several, ROWS, name="several", repository=tmp_path, targets=["left", "right"])

    service = await services.refresh()
    labels = {model: msgspec.json.decode((await service.metadata(model)).properties["labels"]) for model in ("one", "several")}
    requested = RequestedOutput("probabilities_right", {"classification": 1})
    asked = InferRequest("several", (from_array("features", ROWS[:1]),), outputs=(requested,))
    answered: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
    classification.begin(service, asked, lambda result: answered.set_result(result))
    best = to_array((await answered).outputs[0]).ravel()

    assert labels == {
        "one": ["cat", "dog"],
        "several": {"probabilities_left": ["cat", "dog"], "probabilities_right": ["cat", "dog"]},
    }
    assert best.tolist()[0].decode().rpartition(":")[2] == one.predict(ROWS[:1])[0]


async def test_the_pair_in_between_never_serves(services: Services, tmp_path: Path) -> None:
    """New preprocessor with old predictor, and the reverse: both fit in shape and in names, and answer wrongly."""
    publish_model(tmp_path)
    other = tmp_path / "other"
    publish_model(other, MinMaxScaler())
    versions = []
    for half in ("preprocess", "predict"):  # as a second publish writes them, one after the other
        source = Repository(other).open(BundleKey("m", half, 1))
        Repository(tmp_path).write(
            msgspec.structs.replace(source.manifest, version=2), {name: source.read(name) for name in source.listed}
        )
        service = await services.refresh()
        versions.append([state.version for state in await service.index()])
        np.testing.assert_allclose(answer(await service.infer(request())), TARGETS[:2], rtol=1e-3)

    assert versions == [["1.1"], ["1.1"]]
    for mixed in ("2.1", "1.2"):
        with pytest.raises(NotFound) as raised:
            await service.infer(request(mixed))
        if mixed == "2.1":
            assert 'no release names this pair; "splitserve release m 2.1" proves it and makes one' in raised.value.message


async def test_another_fit_of_the_same_shape_never_serves_by_default(services: Services, tmp_path: Path) -> None:
    """A scaler in other units has the same names, shape and datatype."""
    publish_model(tmp_path)
    publish_preprocessor(StandardScaler().fit(ROWS * 1000), ROWS, name="m", repository=tmp_path)

    service = await services.refresh()

    assert (await service.infer(request())).version == "1.1"
    assert (await service.metadata("m")).versions == ("1.1",)


async def test_other_names_for_the_same_numbers_serve_once_they_are_released(services: Services, tmp_path: Path) -> None:
    """A release was proven in numbers; feature names count only for pairs without one."""

    def transforms(step: str) -> ColumnTransformer:
        return ColumnTransformer([(step, StandardScaler(), [0, 1, 2])]).fit(ROWS)

    pipeline = make_pipeline(transforms("scaled"), Ridge(alpha=1e-3)).fit(ROWS, TARGETS)
    publish(pipeline, ROWS, name="m", repository=tmp_path)
    publish_preprocessor(transforms("standardised"), ROWS, name="m", repository=tmp_path)
    release("m", "2.1", repository=tmp_path)

    service = await services.refresh()

    assert (await service.infer(request())).version == "2.1"


async def test_the_newest_release_is_the_default_and_not_the_newest_number(services: Services, tmp_path: Path) -> None:
    """Version 1 that was released again, after a rollback, serves."""
    publish_model(tmp_path)
    publish_model(tmp_path)
    service = await services.refresh()
    before = (await service.infer(request())).version
    release("m", "1.1", repository=tmp_path)

    await services.refresh()

    assert before == "2.2"
    assert (await service.infer(request())).version == "1.1"
    assert (await service.infer(request("2.2"))).version == "2.2"


async def test_a_route_decides_what_serves_by_default(services: Services, tmp_path: Path) -> None:
    """It pins a release; other releases stay callable."""
    publish_model(tmp_path)
    publish_model(tmp_path)
    route = tmp_path / "m" / "route.json"
    route.write_text('{"pairs": [{"pair": "1.1"}]}')

    service = await services.refresh()
    pinned = (await service.infer(request())).version
    route.write_text('{"pairs": [{"pair": "2.2", "weigth": 3}]}')
    await services.refresh()
    kept = (await service.infer(request())).version, [state for state in await service.index() if not state.version]
    route.unlink()
    await services.refresh()

    assert pinned == "1.1"
    assert kept[0] == "1.1"
    assert "unknown field `weigth`" in kept[1][0].reason
    assert (await service.infer(request())).version == "2.2"


async def test_a_broken_route_after_a_restart_leaves_requests_to_name_a_version(services: Services, tmp_path: Path) -> None:
    """The previous default is unknown after a restart."""
    publish_model(tmp_path)
    (tmp_path / "m" / "route.json").write_text('{"pairs": [{"pair": "1.1"}, {"pair": "2.1"}]}')

    service = await services.refresh()

    with pytest.raises(Unavailable, match="no release is chosen: m: route.json: expected exactly one pair, got 2"):
        await service.infer(request())
    assert (await service.infer(request("1.1"))).version == "1.1"


async def test_the_default_serves_until_the_pair_of_the_route_is_ready(services: Services, tmp_path: Path) -> None:
    """A route to a pair that is not loaded yet does not stop the current default."""
    publish_model(tmp_path)
    await services.refresh()
    publish_model(tmp_path)
    model = tmp_path / "m" / "predict" / "2" / "model.onnx"
    data = model.read_bytes()
    model.write_bytes(data[:-1])
    (tmp_path / "m" / "route.json").write_text('{"pairs": [{"pair": "2.2"}]}')

    service = await services.refresh()
    meanwhile = (await service.infer(request())).version
    model.write_bytes(data)
    await services.predictors.load("m")
    await services.refresh()

    assert meanwhile == "1.1"
    assert (await service.infer(request())).version == "2.2"


def rewrite(bundle: Path, **fields: Any) -> None:
    """Change fields of a bundle's manifest, with every digest in the bundle regenerated."""
    path = bundle / "manifest.json"
    manifest = manifests.decode(path.read_bytes())
    path.write_bytes(manifests.encode(msgspec.structs.replace(manifest, **fields)))


@pytest.mark.parametrize(
    ("half", "fields"),
    [
        ("preprocess", {"fingerprint": "", "feature_names": ()}),
        ("preprocess", {"labels": ("b", "a")}),
        ("preprocess", {"created": "yesterday"}),
        ("predict", {"labels": ("b", "a")}),
        ("predict", {"tolerances": {}}),
        ("predict", {"is_row_wise": False}),
    ],
)
async def test_an_edit_with_fresh_digests_is_refused_at_the_next_load(
    services: Services, tmp_path: Path, half: str, fields: dict[str, Any]
) -> None:
    """The bundle is consistent; its release recorded another digest."""
    words = np.where(np.median(TARGETS) < TARGETS, "a", "b")
    publish(make_pipeline(StandardScaler(), LogisticRegression()).fit(ROWS, words), ROWS, name="m", repository=tmp_path)
    rewrite(tmp_path / "m" / half / "1", **fields)

    service = await services.refresh()

    with pytest.raises(Unavailable):
        await service.infer(request())
    assert any("as its releases recorded, got" in state.reason for state in await service.index())


async def test_golden_samples_of_the_whole_are_replayed(services: Services, tmp_path: Path) -> None:
    """Each half passes its own samples, but the whole answers differently than recorded."""
    publish_model(tmp_path)
    change_golden(tmp_path, lambda outputs: outputs + 1)

    service = await services.refresh()
    state = await state_of(service)

    assert state.state == "UNAVAILABLE"
    assert 'm/releases/0001-1.1: output "' in state.reason
    with pytest.raises(Unavailable, match="golden sample"):
        await service.infer(request())


async def test_how_close_golden_answers_are_is_measured(services: Services, tmp_path: Path) -> None:
    """Relative to the tolerance: a release that is about to be refused shows before it is."""
    publish_model(tmp_path)
    service = await services.refresh()
    metrics = Metrics()
    metrics.add("preprocess", StageMetrics("preprocess", service, golden_errors=lambda: service.golden_errors))

    [(labels, ratio)] = (await metrics.snapshot())[GOLDEN_ERROR.name].items()

    assert labels == ("preprocess", "m", "1.1")
    assert 0 <= ratio <= 1  # type: ignore[operator]


async def test_answers_that_are_not_numbers_prove_nothing(services: Services, tmp_path: Path) -> None:
    """All NaN agrees with all NaN."""
    publish_model(tmp_path)
    change_golden(tmp_path, lambda outputs: np.full_like(outputs, np.nan))

    assert "is not finite in any row" in (await state_of(await services.refresh())).reason


async def test_tolerances_beyond_all_bounds_prove_nothing(services: Services, tmp_path: Path) -> None:
    """Every answer would agree."""
    publish_model(tmp_path)
    outputs = Repository(tmp_path).open_release(RELEASE).manifest.outputs
    change_golden(tmp_path, lambda outputs: outputs + 1, tolerances={each.name: Tolerance(atol=1e30) for each in outputs})

    assert "more than 1e-02, the limit for" in (await state_of(await services.refresh())).reason


def change_golden(root: Path, change: Any, **fields: Any) -> None:
    """Rewrite a release with other golden answers and manifest fields, digests included."""
    repository = Repository(root)
    recorded = repository.open_release(RELEASE)
    manifest = recorded.manifest
    golden = goldens.decode(recorded.read("golden.npz"), manifest.inputs, manifest.outputs)
    outputs = tuple(from_array(each.name, change(to_array(each)), each.datatype) for each in golden.outputs)
    files = {"golden.npz": goldens.encode(goldens.Golden(golden.inputs, outputs))}
    folder = repository.folder(RELEASE)
    shutil.rmtree(folder)
    fresh = encode(msgspec.structs.replace(manifest, files=release_log.digests(files), **fields))
    release_log.write_folder(folder, {**files, "manifest.json": fresh})


async def test_a_release_is_proven_once_and_not_counted(services: Services, tmp_path: Path) -> None:
    """Refreshes do not replay again, and statistics show what clients sent."""
    publish_model(tmp_path)
    await services.refresh()
    replayed: list[InferRequest] = []
    infer = services.predict.infer

    async def watched(request: InferRequest) -> InferResponse:
        replayed.append(request)
        return await infer(request)

    services.predict.infer = watched  # type: ignore[method-assign]
    for _ in range(3):
        await services.refresh()
    counted = services.predict.statistics.of("m", "1").inference_count

    assert replayed == []
    assert counted == 0


async def test_what_is_wrong_with_another_predictor_is_no_reason(services: Services, tmp_path: Path) -> None:
    publish_model(tmp_path)
    (tmp_path / "m" / "predict" / "1" / "model.onnx").write_bytes(b"damaged")
    await services.refresh()
    publish_model(tmp_path)

    await services.preprocessors.refresh()
    await services.service.refresh()

    assert "model.onnx" in (await state_of(services.service, "1.1")).reason
    assert (await state_of(services.service, "2.2")).reason == "the predict service does not have predictor 2"


async def test_a_release_that_predict_has_not_seen_yet_is_no_error(services: Services, tmp_path: Path) -> None:
    """The two poll the repository at different times, so each publish may look like this for a moment."""
    publish_model(tmp_path)
    with capture_logs() as log:
        await services.preprocessors.refresh()
        await services.service.refresh()
        await services.refresh()
        await services.refresh()

    assert [line["log_level"] for line in log if line["event"] == "predictor missing"] == ["warning"]
    assert "error" not in {line["log_level"] for line in log}
    assert (await state_of(services.service)).state == READY


async def test_predict_that_is_not_available_refuses_nothing(services: Services, tmp_path: Path) -> None:
    """The release waits, and is proven when predict answers again."""
    publish_model(tmp_path)
    infer = services.predict.infer

    async def away(request: InferRequest) -> InferResponse:
        raise Unavailable("the predict service cannot be reached")

    services.predict.infer = away  # type: ignore[method-assign]
    service = await services.refresh()
    waiting = await state_of(service), await service.not_ready_reason()
    services.predict.infer = infer  # type: ignore[method-assign]
    await services.refresh()

    assert waiting[0].state == LOADING
    assert "the predict service cannot be reached" in waiting[0].reason
    assert waiting[1] != ""
    assert (await state_of(service)).state == READY


async def test_golden_rows_are_sent_in_chunks_below_the_limit(tmp_path: Path, executor: Executor) -> None:
    """A release whose samples exceed the message limit serves, too."""
    publish_model(tmp_path)
    services = Services(tmp_path, executor, max_message_bytes=200)
    sent: list[int] = []
    infer = services.predict.infer

    async def watched(request: InferRequest) -> InferResponse:
        sent.append(sum(len(tensor.raw) for tensor in request.inputs))
        return await infer(request)

    services.predict.infer = watched  # type: ignore[method-assign]
    service = await services.refresh()

    assert (await state_of(service)).state == READY
    assert len(sent) > 1
    assert max(sent) <= 100


async def test_each_call_names_the_predictor_that_it_expects(services: Services, tmp_path: Path) -> None:
    """A predictor that was replaced under its number answers no call for the previous one."""
    publish_model(tmp_path)
    service = await services.refresh()
    await service.infer(request())
    features = InferRequest("m", (from_array("features", ROWS[:1].astype(np.float32)),), version="1")
    _, predictor = services.predictors.choose("m", 1)
    inputs = tuple(
        msgspec.structs.replace(tensor, name=spec.name) for tensor, spec in zip(features.inputs, predictor.inputs, strict=True)
    )

    with pytest.raises(Unavailable, match="predictor 1 was replaced: expected the manifest with sha256 bbbb"):
        await services.predict.infer(msgspec.structs.replace(features, inputs=inputs, parameters={EXPECTED_MANIFEST: "b" * 64}))


async def test_a_predict_service_that_has_another_bundle_under_the_number_is_refused(
    services: Services, tmp_path: Path, executor: Executor
) -> None:
    """Each stage reads its own copy of the repository; the release's digests show that the copies differ."""
    publish_model(tmp_path)
    publish_model(tmp_path / "other", MinMaxScaler())
    theirs = Services(tmp_path / "other", executor)
    await theirs.refresh()
    service = PreprocessService(services.preprocessors, theirs.predict, executor)
    await services.preprocessors.refresh()
    await service.refresh()

    state = await state_of(service)

    assert state.state == "UNAVAILABLE"
    assert "m/releases/0001-1.1: predictor: expected the bundle whose manifest has sha256" in state.reason


async def test_a_withdrawn_release_leaves_the_index_and_stays_callable_for_a_while(services: Services, tmp_path: Path) -> None:
    """Requests that were bound to it are answered; those without a version get the previous release."""
    publish_model(tmp_path)
    publish_model(tmp_path)
    service = await services.refresh()
    withdraw("m", 2, repository=tmp_path)

    await services.refresh()

    assert [state.version for state in await service.index()] == ["1.1"]
    assert (await service.infer(request())).version == "1.1"
    assert (await service.infer(request("2.2"))).version == "2.2"


async def test_a_setting_allows_pairs_that_no_release_names(tmp_path: Path, executor: Executor) -> None:
    """Their metadata says so, and releases take precedence."""
    publish_preprocessor(StandardScaler().fit(ROWS), ROWS, name="m", repository=tmp_path)
    publish_predictor(affine_model(3, 1, 0), ROWS.astype(np.float32), name="m", repository=tmp_path)
    services = Services(tmp_path, executor, allow_unreleased_pairs=True)
    service = await services.refresh()
    metadata = await service.metadata("m")

    assert (await service.infer(request())).version == "1.1"
    assert "no release proves this pair, allowed by a setting" in metadata.properties["warnings"]
    assert "release_sequence" not in metadata.properties


async def test_the_setting_does_not_bring_back_what_was_withdrawn(tmp_path: Path, executor: Executor) -> None:
    """An operator who withdraws a release wants it gone, whatever else is allowed."""
    services = Services(tmp_path, executor, allow_unreleased_pairs=True)
    for scaler in (StandardScaler(), MinMaxScaler()):
        publish_model(tmp_path, scaler)
    await services.refresh()
    withdraw("m", 2, repository=tmp_path)

    service = await services.refresh()
    defaults = (await service.infer(request())).version

    assert defaults == "1.1"
    assert "2.2" not in {state.version for state in await service.index()}
    assert (await service.infer(request("2.2"))).version == "2.2", "it is within its grace"


async def test_ready_means_that_everything_has_been_tried(services: Services, tmp_path: Path) -> None:
    """Predict has one model and loads the other; preprocess has both: a request for the other would fail."""
    publish_model(tmp_path)
    await services.predictors.refresh()
    publish_model(tmp_path, name="slow")
    services.predictors.is_loaded = False
    await services.preprocessors.refresh()
    await services.service.refresh()
    meanwhile = (await state_of(services.service)).state, await services.service.not_ready_reason()

    service = await services.refresh()

    assert meanwhile == (READY, STILL_LOADING)
    assert await service.not_ready_reason() == ""


async def test_what_is_loaded_after_the_index_was_made_is_not_taken_for_known(
    services: Services, tmp_path: Path, executor: Executor
) -> None:
    """Predict loads its last model while preprocess waits for other answers: a request for that model would fail."""
    publish_model(tmp_path)
    await services.refresh()
    publish_model(tmp_path, name="last")
    await services.preprocessors.refresh()
    services.predictors.is_loaded = False
    service = PreprocessService(
        services.preprocessors, services.predict, executor, predict_indexes=lambda _: index_before_loading(services)
    )
    await service.refresh()
    meanwhile = await service.not_ready_reason()

    await service.refresh()

    assert meanwhile == STILL_LOADING
    assert await service.not_ready_reason() == ""
    assert {state.name for state in await service.index() if state.state == READY} == {"m", "last"}


async def index_before_loading(services: Services) -> list[list[ModelState]]:
    """The index of predict, which has loaded everything when the answer arrives."""
    index = await services.predict.index()
    await services.predictors.refresh()
    return [index]
