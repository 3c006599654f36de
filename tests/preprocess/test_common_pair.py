"""Whatever the newest releases lack, a restart serves the newest whose halves both load: the stages agree on what to hold."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from predict_service.service import PredictService
from preprocess_service.service import PreprocessService
from splitserve import publish
from splitserve.arrays import from_array, to_array
from splitserve.oip.messages import InferRequest
from splitserve.repository import golden as goldens
from splitserve.repository import release_log
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import GOLDEN_FILE, MANIFEST_FILE, BundleError
from splitserve.repository.release import ReleaseKey, encode
from splitserve.repository.selection import Selection, parse_policies
from splitserve.runtimes import predictor as predictors
from splitserve.runtimes import preprocessor as preprocessors
from splitserve.server.store import NEEDED_FOR_S, VersionStore
from splitserve.versions import Pair
from tests.budgets import examples
from tests.server.test_store import Clock

ROWS = np.random.default_rng(0).normal(loc=5, size=(30, 3))
N_RELEASES = 6


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six releases of ``m``: 1.1 to 6.6."""
    models = tmp_path_factory.mktemp("models")
    for number in range(1, N_RELEASES + 1):
        publish(make_pipeline(StandardScaler(), Ridge()).fit(ROWS, ROWS.sum(axis=1) * number), ROWS, name="m", repository=models)
    return models


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


class Stages:
    """Predict and preprocess, just started. Each refuses some bundles, as a stage does that runs other library versions."""

    def __init__(
        self, models: Path, executor: Executor, policy: str, *, refused: tuple[Collection[int], Collection[int]] = ((), ())
    ) -> None:
        self.clock = Clock()
        options: dict[str, Any] = {"selection": Selection(policies=parse_policies(policy)), "clock": self.clock}
        refused_preprocessors, refused_predictors = refused
        self.predictors = VersionStore(
            Repository(models), "predict", refusing(refused_predictors, predictors.load), unload_delay_s=30, **options
        )
        self.preprocessors = VersionStore(
            Repository(models), "preprocess", refusing(refused_preprocessors, preprocessors.load), unload_delay_s=30, **options
        )
        predict = PredictService(self.predictors, executor)
        self.service = PreprocessService(self.preprocessors, predict, executor, predict_indexes=predict.indexes)

    async def settle(self) -> None:
        """Some rounds of refreshes, each stage for itself."""
        for _ in range(8):
            await self.predictors.refresh()
            await self.preprocessors.refresh()
            await self.service.refresh()

    async def ready(self) -> list[str]:
        """The pairs that serve, the oldest first."""
        return [state.version for state in await self.service.index() if state.state == "READY"]


def refusing(versions: Collection[int], load: Any) -> Any:
    def load_or_refuse(bundle: Bundle) -> Any:
        if bundle.key.version in versions:
            raise BundleError("published with other libraries")
        return load(bundle)

    return load_or_refuse


def request() -> InferRequest:
    return InferRequest("m", (from_array("features", ROWS[:1]),))


SETS = st.sets(st.integers(2, N_RELEASES), max_size=N_RELEASES - 1)


@settings(max_examples=examples(40), deadline=None)
@given(preprocessors=SETS, predictors=SETS, n_latest=st.integers(1, 3))
async def test_a_restart_serves_the_newest_release_whose_halves_load(
    published: Path, executor: Executor, preprocessors: set[int], predictors: set[int], n_latest: int
) -> None:
    """And holds as many before it as the settings say, and one more."""
    good = [number for number in range(1, N_RELEASES + 1) if number not in preprocessors | predictors]
    stages = Stages(published, executor, f"latest:{n_latest}", refused=(preprocessors, predictors))

    await stages.settle()

    assert (await stages.service.infer(request())).version == f"{good[-1]}.{good[-1]}"
    held = [f"{number}.{number}" for number in good[-(n_latest + 1) :]]
    assert (await stages.ready())[-len(held) :] == held


async def test_releases_whose_whole_answers_otherwise_do_not_count_either(
    published: Path, executor: Executor, tmp_path: Path
) -> None:
    """Every half loads, and the whole of the newest three is refused."""
    models = Path(shutil.copytree(published, tmp_path / "models"))
    for number in (4, 5, 6):
        spoil(models, ReleaseKey("m", number, Pair(number, number)))
    stages = Stages(models, executor, "latest:1")

    await stages.settle()

    assert await stages.ready() == ["2.2", "3.3"]
    assert (await stages.service.infer(request())).version == "3.3"


def spoil(models: Path, key: ReleaseKey) -> None:
    """Record other answers, with digests that are right."""
    record = Repository(models).open_release(key)
    golden = goldens.decode(record.read(GOLDEN_FILE), record.manifest.inputs, record.manifest.outputs)
    outputs = tuple(from_array(each.name, to_array(each) * 2, each.datatype) for each in golden.outputs)
    data = goldens.encode(goldens.Golden(golden.inputs, outputs))
    (record.folder / GOLDEN_FILE).write_bytes(data)
    changed = msgspec.structs.replace(record.manifest, files=release_log.digests({GOLDEN_FILE: data}))
    (record.folder / MANIFEST_FILE).write_bytes(encode(changed))


async def test_what_is_needed_no_longer_is_unloaded(published: Path, executor: Executor, tmp_path: Path) -> None:
    """Once a release serves again that is newer, both stages unload what they held in its place."""
    models = Path(shutil.copytree(published, tmp_path / "models"))
    stages = Stages(models, executor, "latest:1", refused=({4, 5, 6}, ()))
    await stages.settle()
    before = set(stages.predictors.catalogue.ready_versions("m"))
    for number in (7, 8):
        publish(make_pipeline(StandardScaler(), Ridge()).fit(ROWS, ROWS.sum(axis=1) * number), ROWS, name="m", repository=models)
    await stages.settle()

    stages.clock.now += NEEDED_FOR_S + 30
    await stages.settle()

    assert before == {2, 3, 5, 6}
    assert set(stages.predictors.catalogue.ready_versions("m")) == {7, 8}
    assert set(stages.preprocessors.catalogue.ready_versions("m")) == {7, 8}


async def test_nothing_is_loaded_because_somebody_names_it_that_no_release_names(
    published: Path, executor: Executor, tmp_path: Path
) -> None:
    """Who can reach predict cannot make it load other bundles."""
    models = Path(shutil.copytree(published, tmp_path / "models"))
    shutil.copytree(models / "m" / "predict" / "6", models / "m" / "predict" / "7")
    store = VersionStore(Repository(models), "predict", predictors.load, selection=Selection(policies=parse_policies("latest:1")))
    await store.refresh()

    store.need([("m", 7), ("m", 99), ("other", 1), ("m", 1)])
    await store.refresh()

    assert set(store.catalogue.entries("m")) == {1, 5, 6}
    assert BundleKey("m", "predict", 7) in set(Repository(models).bundles())
