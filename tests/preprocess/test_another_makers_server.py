"""A release that was proven with a running third-party server: replayed repeatedly, since such a server reports no changes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sklearn.preprocessing import FunctionTransformer

from preprocess_service import golden_replay
from preprocess_service.service import PreprocessService
from splitserve import publish_preprocessor
from splitserve.arrays import from_array, to_array
from splitserve.errors import Unavailable
from splitserve.oip.messages import READY, UNAVAILABLE, InferRequest, InferResponse, ModelState
from splitserve.repository import release_log
from splitserve.repository.folder import Repository
from splitserve.repository.golden import Golden, encode
from splitserve.repository.manifest import Tolerance
from splitserve.repository.release import SCHEMA_VERSION, ReleaseManifest
from splitserve.runtimes import preprocessor as preprocessors
from splitserve.server.store import VersionStore
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature
from tests.server.test_store import Clock

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
FEATURES = TensorSpec("features", "FP32", ("batch", 3))
SCORES = TensorSpec("scores", "FP32", ("batch", 3))


class Server(FakeInference):
    """Multiplies; reports neither digests nor changes of its model."""

    def __init__(self) -> None:
        super().__init__(signature("m", [FEATURES], [SCORES], version="0"), answer=self.multiplied)
        self.factor = 2.0
        self.is_away = False

    def multiplied(self, request: InferRequest) -> InferResponse:
        scores = from_array("scores", to_array(request.inputs[0]) * np.float32(self.factor))
        return InferResponse(request.model, request.version, (scores,), request.id)

    async def index(self) -> list[ModelState]:
        if self.is_away:
            raise Unavailable("the predict service cannot be reached")
        return await super().index()


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
async def service(tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> PreprocessService:
    """A preprocessor that passes rows on, and a release with the server as it is now."""
    bundle = publish_preprocessor(FunctionTransformer().fit(ROWS), ROWS, name="m", repository=tmp_path)
    files = {"golden.npz": encode(Golden((from_array("features", ROWS),), (from_array("scores", ROWS * 2),)))}

    def make(sequence: int) -> tuple[ReleaseManifest, dict[str, bytes]]:
        manifest = ReleaseManifest(
            schema_version=SCHEMA_VERSION, model="m", sequence=sequence, pair="1.0", created="", proven="server",
            preprocessor=bundle.manifest_sha256, inputs=bundle.manifest.inputs, outputs=(SCORES,),
            server_inputs=(FEATURES,), server_outputs=(SCORES,), tolerances={"scores": Tolerance(1e-5)},
            files=release_log.digests(files),
        )  # fmt: skip
        return manifest, files

    release_log.append(tmp_path, "m", make)
    store = VersionStore(Repository(tmp_path), "preprocess", preprocessors.load)
    service = PreprocessService(store, Server(), executor)
    await store.refresh()
    return service


async def state_of(service: PreprocessService) -> tuple[str, str]:
    for _ in range(2):  # a replay of what serves already is not waited for
        await service.refresh()
        await service._replay.settle(10)
    await service.refresh()
    (state,) = [state for state in await service.index() if state.version]
    return state.state, state.reason


async def test_it_serves_without_the_setting(service: PreprocessService) -> None:
    """The replay of its golden samples has shown that it answers as recorded."""
    assert await state_of(service) == (READY, "")
    assert service._predict.requests[0].parameters == {}  # type: ignore[attr-defined]


async def test_it_is_replayed_after_every_reconnect(service: PreprocessService) -> None:
    """After an outage the address may belong to another server."""
    server: Server = service._predict  # type: ignore[assignment]
    await state_of(service)
    server.is_away = True
    await service.refresh()
    server.is_away, server.factor = False, 3.0

    state, reason = await state_of(service)

    assert state == UNAVAILABLE
    assert 'm/releases/0001-1.0: output "scores" of golden sample' in reason


async def test_it_is_replayed_every_ten_minutes(service: PreprocessService) -> None:
    """And serves again when it answers as recorded."""
    clock = Clock()
    service._replay._clock = clock
    server: Server = service._predict  # type: ignore[assignment]
    states = [await state_of(service)]
    for factor, seconds in ((3.0, 1.0), (3.0, golden_replay.REPEAT_S), (2.0, 2 * golden_replay.REPEAT_S)):
        server.factor, clock.now = factor, seconds
        states.append(await state_of(service))

    assert [state for state, _ in states] == [READY, READY, UNAVAILABLE, READY]


async def test_a_server_with_another_signature_is_refused(service: PreprocessService) -> None:
    """Before anything is sent to it."""
    server: Server = service._predict  # type: ignore[assignment]
    server.signatures = {("m", "0"): signature("m", [FEATURES], [TensorSpec("scores", "FP32", ("batch", 4))], version="0")}

    state, reason = await state_of(service)

    assert state == UNAVAILABLE
    assert 'the predict server has another signature than was proven: "scores"' in reason
