"""A program that uses the client as applications do. Checked by mypy and pyright, strictly; not run."""

import asyncio
from collections.abc import Sequence
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

from splitserve import TLS, Answer, AsyncClient, Client
from splitserve.client import AsyncJob, ClientClosed, Job
from splitserve.errors import NotFound, SplitserveError, Unavailable
from splitserve.oip.messages import ModelMetadata, ModelState
from splitserve.testing import FakeClient, fake


def species(client: Client, rows: Sequence[dict[str, float]]) -> list[str]:
    answer = client.infer("penguins", rows, version=1, timeout_s=float("inf"), request_id="r-1", extra="drop")
    assert_type(answer, Answer)
    assert_type(answer["label"], npt.NDArray[Any])
    assert_type(answer.version, str)
    assert_type(answer.labels, dict[str, list[str]])
    assert_type(answer.to_records(), list[dict[str, Any]])
    return [str(label) for label in answer["label"].tolist()]


def facts(client: Client) -> None:
    assert_type(client.is_ready(), bool)
    assert_type(client.metadata("penguins"), ModelMetadata)
    assert_type(client.models(), list[ModelState])
    assert_type(client.submit("penguins", {"x": [1.0]}), Job)
    assert_type(client.url, str)


async def main() -> None:
    async with AsyncClient("https://host", tls=TLS(ca_file="ca.pem"), headers=lambda: {"x-team": "birds"}) as client:
        assert_type(client, AsyncClient)
        answers = await asyncio.gather(*(client.infer("m", np.zeros((1, 2))) for _ in range(3)))
        assert_type(answers, list[Answer])
        assert_type(await client.submit("m", [[1]]), AsyncJob)


def run() -> None:
    with Client("http://127.0.0.1:8000", token=lambda: "secret", max_concurrency=8, retry_on=[Unavailable], text=bytes) as client:
        assert_type(client, Client)
        try:
            species(client, [{"x": 1.0}])
        except (NotFound, ClientClosed) as error:
            print(error)
        except SplitserveError as error:
            assert_type(error.message, str)
    with fake("penguins", {"label": ["Gentoo"]}, inputs={"x": "FP64"}) as fake_client:
        assert_type(fake_client, FakeClient)
        assert_type(fake_client.requests, list[dict[str, npt.NDArray[Any]]])
    asyncio.run(main())
