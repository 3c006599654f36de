"""A request that names no version is answered while replicas poll out of phase, and while their images are replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import numpy as np
import pytest

from proxy.service import ProxyService
from splitserve.arrays import from_array
from splitserve.batching.admission import BACKGROUND_PRIORITY
from splitserve.catalogue import STILL_LOADING
from splitserve.errors import InvalidInput, NotFound, Unavailable
from splitserve.oip.messages import (
    DEFAULT,
    PRIORITY,
    READY,
    RELEASE_DIGEST,
    RELEASE_SEQUENCE,
    ROW_WISE,
    UNAVAILABLE,
    InferRequest,
    InferResponse,
    ModelState,
)
from splitserve.remote.inference import RemoteInference
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, serving, signature
from splitserve.versions import unknown_model

FEATURES = TensorSpec("features", "FP64", ("batch", 3))


class Preprocess(FakeInference):
    """A replica with releases; the first of its pairs that is named serves requests without a version."""

    def __init__(self, *pairs: str, default: str = "") -> None:
        super().__init__(*(signature("m", [FEATURES], version=pair) for pair in ("1.1", "2.2", "3.3")), answer=self.answer_with)
        self.has(*pairs, default=default)

    def has(self, *pairs: str, default: str = "") -> None:
        self.pairs = pairs
        chosen = default or max(pairs, default="")
        self.states = [
            ModelState("m", pair, READY, "", {
                RELEASE_SEQUENCE: pair[0], RELEASE_DIGEST: pair, **({DEFAULT: "true"} if pair == chosen else {}),
            })
            for pair in pairs
        ]  # fmt: skip

    def answer_with(self, request: InferRequest) -> InferResponse:
        if request.version not in self.pairs:
            raise NotFound(f"{unknown_model('m')}, version {request.version}", stage="preprocess")
        return InferResponse(request.model, request.version, request.inputs, request.id)


def request(version: str = "", n_rows: int = 1) -> InferRequest:
    return InferRequest("m", (from_array("features", np.ones((n_rows, 3))),), version=version)


@asynccontextmanager
async def edge(*replicas: Preprocess) -> AsyncIterator[ProxyService]:
    """A proxy in front of replicas, each at an address of its own."""
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serving(each, stage="preprocess")) for each in replicas]

        async def resolve(host: str, port: int) -> list[str]:
            return [f"ipv4:{address}" for address in addresses]

        remote = await stack.enter_async_context(RemoteInference("preprocess:1", stage="preprocess", resolve=resolve))
        while remote.n_replicas < len(replicas):  # noqa: ASYNC110, it takes turns of the loop
            await asyncio.sleep(0)
        proxy = ProxyService(remote, n_replicas=lambda: remote.n_replicas, indexes=remote.indexes)
        await proxy.refresh()
        yield proxy


async def answers(proxy: ProxyService, n_requests: int = 24) -> set[str]:
    """The pairs that answer requests without a version, one after the other so that each replica is asked."""
    return {(await proxy.infer(request())).version for _ in range(n_requests)}


@pytest.mark.parametrize(
    ("replicas", "served"),
    [
        (["1.1 2.2", "1.1", "1.1"], {"1.1"}),  # a publish that one of three has seen
        (["1.1 2.2", "1.1 2.2", "1.1"], {"1.1"}),
        (["2.2 3.3", "1.1 2.2"], {"2.2"}),  # images of which each has two releases
        (["1.1", "2.2", "2.2"], {"2.2"}),  # none is shared: what most have, and only there
        (["1.1 2.2", "1.1 2.2"], {"2.2"}),
    ],
)
async def test_the_newest_release_that_all_replicas_have_is_used(replicas: Sequence[str], served: set[str]) -> None:
    """No request is sent to a replica without that release."""
    fakes = [Preprocess(*each.split()) for each in replicas]
    async with edge(*fakes) as proxy:
        assert await answers(proxy) == served


async def test_replicas_that_poll_between_two_refreshes_lose_no_request() -> None:
    """The proxy's index is outdated: the chosen release is gone from one replica, then from all."""
    fakes = [Preprocess("1.1", "2.2"), Preprocess("1.1", "2.2"), Preprocess("1.1", "2.2")]
    async with edge(*fakes) as proxy:
        before = await answers(proxy)
        for gone in range(1, len(fakes) + 1):
            for fake in fakes[:gone]:
                fake.has("1.1")
            assert await answers(proxy) <= {"1.1", "2.2"}
        after = await answers(proxy)

    assert (before, after) == ({"2.2"}, {"1.1"})


async def test_a_request_that_names_a_version_is_not_bound_to_another() -> None:
    """Not even when merged with requests that are."""
    fake = Preprocess("1.1", "2.2")
    async with edge(fake) as proxy:
        fake.has("1.1")
        outcomes = await asyncio.gather(*(proxy.infer(request(version)) for version in ("2.2", "") * 8), return_exceptions=True)

    named, free = outcomes[::2], outcomes[1::2]
    assert {type(each) for each in named} == {NotFound}
    assert {each.version for each in free if isinstance(each, InferResponse)} == {"1.1"}
    assert not [each for each in free if isinstance(each, Exception)]


async def test_a_version_that_is_named_goes_to_the_replica_that_has_it() -> None:
    """Even if only one replica has it."""
    async with edge(Preprocess("1.1"), Preprocess("1.1", "2.2"), Preprocess("1.1")) as proxy:
        assert {(await proxy.infer(request("2.2"))).version for _ in range(12)} == {"2.2"}


async def test_a_release_that_no_replica_knows_any_more_is_unavailable_and_not_unknown() -> None:
    """The caller named no version, so a retry may succeed."""
    fake = Preprocess("1.1")
    async with edge(fake) as proxy:
        fake.has()
        fake.states = [ModelState("m", "1.1", UNAVAILABLE, "being unloaded")]
        with pytest.raises(Unavailable):
            await proxy.infer(request())


async def test_a_withdrawn_release_is_asked_for_a_while_longer() -> None:
    """It has left the index, and is callable by its version until its grace ends."""
    fake = Preprocess("1.1", "2.2")
    async with edge(fake) as proxy:
        fake.states = [state for state in fake.states if state.version == "1.1"]
        await proxy.refresh()

        assert (await proxy.infer(request("2.2"))).version == "2.2"
        assert [state.version for state in await proxy.index()] == ["1.1"]


async def test_a_pin_is_followed_although_newer_releases_are_ready() -> None:
    """Preprocess alone decides which release serves."""
    async with edge(Preprocess("1.1", "2.2", default="1.1"), Preprocess("1.1", "2.2", default="1.1")) as proxy:
        assert await answers(proxy) == {"1.1"}
        assert (await proxy.metadata("m")).properties[DEFAULT] == "1.1"


async def test_without_a_default_requests_have_to_name_a_version() -> None:
    """After a restart with a broken route nobody can tell what was to serve: 503 with the reason, and named ones are answered."""
    fake = Preprocess("1.1", "2.2")
    for state in fake.states:
        dict.pop(state.properties, DEFAULT, None)  # type: ignore[arg-type]
    fake.states.append(ModelState("m", "", UNAVAILABLE, "m: route.json: Input data was truncated"))
    async with edge(fake) as proxy:
        with pytest.raises(Unavailable, match=r"no release is chosen: m: route\.json: Input data was truncated; name a version"):
            await proxy.infer(request())

        assert (await proxy.infer(request("1.1"))).version == "1.1"


async def test_the_index_tells_the_release_and_the_default() -> None:
    """Over every transport."""
    async with edge(Preprocess("1.1", "2.2")) as proxy:
        states = {state.version: state.properties for state in await proxy.index()}

    assert states["2.2"] == {RELEASE_SEQUENCE: "2", RELEASE_DIGEST: "2.2", DEFAULT: "true"}
    assert DEFAULT not in states["1.1"]


async def test_requests_to_a_release_that_is_not_row_wise_are_not_merged() -> None:
    """An answer that depends on the other rows of a call is never computed together with those of other callers."""
    fake = Preprocess("1.1")
    key = ("m", "1.1")
    fake.signatures[key] = msgspec.structs.replace(fake.signatures[key], properties={ROW_WISE: "false"})
    proxy = ProxyService(fake)
    await proxy.refresh()

    await asyncio.gather(*(proxy.infer(request()) for _ in range(5)))

    assert [each.n_rows for each in fake.requests] == [1] * 5


@pytest.mark.parametrize("priority", [1, BACKGROUND_PRIORITY])
async def test_requests_with_and_without_a_version_are_merged_and_only_the_latter_are_bound_to_another_release(
    priority: int,
) -> None:
    """Jobs name their release: they share calls with others, and no other release answers them."""
    fake = Preprocess("1.1", "2.2")
    proxy = ProxyService(fake)
    await proxy.refresh()
    named = msgspec.structs.replace(request("2.2"), parameters={PRIORITY: priority})

    both = await asyncio.gather(proxy.infer(request()), proxy.infer(named))
    assert [(each.n_rows, each.version) for each in fake.requests] == [(2, "2.2")]
    fake.has("1.1")
    after = await asyncio.gather(proxy.infer(request()), proxy.infer(named), return_exceptions=True)

    assert [answer.version for answer in both] == ["2.2", "2.2"]
    assert after[0].version == "1.1"
    assert isinstance(after[1], NotFound)


async def test_the_proxy_is_ready_when_preprocess_has_tried_everything() -> None:
    """Not when only the first of several models is ready: a request for the others would fail."""
    fake = Preprocess("1.1")
    fake.not_ready = "models are still being loaded"
    proxy = ProxyService(fake)
    await proxy.refresh()
    await proxy.refresh()
    before = await proxy.not_ready_reason()
    fake.not_ready = ""
    await proxy.refresh()
    ready = await proxy.not_ready_reason()
    fake.not_ready = "models are still being loaded"
    await proxy.refresh()

    assert (before, ready) == ("models are still being loaded", "")
    assert await proxy.not_ready_reason() == ""


async def test_a_bad_request_is_not_bound_to_another_release() -> None:
    """Only a missing release is a reason to bind a request again."""
    async with edge(Preprocess("1.1", "2.2")) as proxy:
        with pytest.raises(InvalidInput):
            await proxy.infer(InferRequest("m", (from_array("features", np.ones((1, 4))),)))


async def test_what_preprocess_admits_after_its_index_was_made_is_not_taken_for_known() -> None:
    """Preprocess admits its last pair between two questions: the proxy is not ready before it knows that pair."""
    backend = Preprocess("1.1")
    backend.not_ready = STILL_LOADING

    async def indexes() -> list[list[ModelState]]:
        index = await backend.index()
        backend.has("1.1", "2.2")
        backend.not_ready = ""
        return [index]

    proxy = ProxyService(backend, indexes=indexes)
    await proxy.refresh()
    meanwhile = await proxy.not_ready_reason()

    await proxy.refresh()

    assert meanwhile == STILL_LOADING
    assert await proxy.not_ready_reason() == ""
    assert {state.version for state in await proxy.index()} == {"1.1", "2.2"}
