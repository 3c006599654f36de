"""Inputs that a model ignores do not reach preprocess: not in a request, and not in a job."""

from __future__ import annotations

import msgspec
import pytest

from proxy.service import ProxyService
from splitserve.errors import InvalidInput
from splitserve.oip.messages import InferRequest
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, signature

MODEL = msgspec.structs.replace(
    signature("m", [TensorSpec("x", "FP32", ("batch", 1))], version="1.1"), properties={"ignored_inputs": '["id", "x2"]'}
)
ID, X, OTHER = (Tensor(name, "FP32", (1, 1), b"\0" * 4) for name in ("id", "x", "other"))


@pytest.fixture
async def proxy() -> tuple[ProxyService, FakeInference]:
    behind = FakeInference(MODEL)
    proxy = ProxyService(behind)
    await proxy.refresh()
    return proxy, behind


async def test_they_are_removed_before_the_request_is_checked(proxy: tuple[ProxyService, FakeInference]) -> None:
    service, behind = proxy

    response = await service.infer(InferRequest("m", (ID, X), version="1.1"))

    assert response.outputs == behind.requests[0].inputs == (X,)
    assert service.bind(InferRequest("m", (ID, X), version="1.1")).inputs == (X,)


@pytest.mark.parametrize(
    ("inputs", "message"), [((X, OTHER, ID), 'unknown input "other"'), ((ID,), 'missing input "x"')], ids=["unknown", "missing"]
)
async def test_all_others_are_checked(proxy: tuple[ProxyService, FakeInference], inputs: tuple[Tensor], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        await proxy[0].infer(InferRequest("m", inputs, version="1.1"))


@pytest.mark.parametrize("text", ["", "id", '{"id": 1}', "[1]"])
async def test_a_property_of_another_maker_means_nothing(text: str) -> None:
    service = ProxyService(FakeInference(msgspec.structs.replace(MODEL, properties={"ignored_inputs": text})))
    await service.refresh()

    with pytest.raises(InvalidInput, match='unknown input "id"'):
        await service.infer(InferRequest("m", (X, ID), version="1.1"))
