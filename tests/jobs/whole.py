"""The proxy with the jobs service: real faces on free ports, over a service that answers without any model behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx

from jobs_service import build
from jobs_service.face import JobsFace
from jobs_service.settings import JobsSettings
from proxy.faces import Faces, authenticator_of
from proxy.guard import JobsGuard
from proxy.remote_jobs import RemoteJobs
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.api.splitserve.jobs.v1 import jobs_pb2 as pb
from splitserve.jobs.protobuf import SERVICE
from splitserve.jobs.service import JobQueue
from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.remote.inference import RemoteInference
from splitserve.testing import FakeInference
from tests.contracts.faces import MODELS, answer
from tests.system.processes import free_ports


class Backend(FakeInference):
    """What is behind the proxy. ``gate``: requests wait for it."""

    def __init__(self) -> None:
        super().__init__(*MODELS, answer=answer)
        self.gate = asyncio.Event()
        self.gate.set()

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        await self.gate.wait()
        return self._answer(request)


class Whole(NamedTuple):
    """What is running: clients of the proxy's faces, and the parts."""

    rest: httpx.AsyncClient
    channel: grpc.aio.Channel
    backend: Backend
    queue: JobQueue
    url: str
    grpc_url: str
    faces: Faces
    service: ProxyService

    async def call(self, method: str, request: Any, **options: Any) -> Any:
        """A method of the jobs service at the proxy."""
        response = getattr(pb, f"{method}Response")
        data = await self.channel.unary_unary(f"/{SERVICE}/{method}")(request.SerializeToString(), **options)
        return response.FromString(data)

    async def submitted(self, model: str = "echo", rows: Any = ((1.0, 2.0),), **options: Any) -> dict[str, Any]:
        response = await self.rest.post(f"/v2/models/{model}/jobs", json=body(rows), **options)
        assert response.status_code == 202, response.text
        job: dict[str, Any] = response.json()
        return job

    async def ended(self, job: dict[str, Any], **options: Any) -> dict[str, Any]:
        while True:
            found: dict[str, Any] = (await self.rest.get(job["urls"]["self"], params={"wait": "5"}, **options)).json()
            if found["status"] not in ("queued", "running"):
                return found


def body(rows: Any) -> dict[str, Any]:
    """A V2 request of FP32 rows."""
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(rows), len(rows[0])], "data": [*map(list, rows)]}]}


async def until(is_true: Callable[[], bool]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(30):
        while not is_true():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


@asynccontextmanager
async def whole(
    folder: Path, *, is_fused: bool = False, jobs: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Whole]:
    """Start it. ``jobs``: settings of the jobs service, ``options``: of the proxy."""
    jobs_port, grpc_port = free_ports(2)
    backend = Backend()
    service = ProxyService(backend)
    await service.refresh()
    config = ProxySettings(http_port=0, grpc_port=grpc_port, grace_s=5, jobs_target=f"127.0.0.1:{jobs_port}", **options)
    settings = JobsSettings(
        dir=str(folder / "jobs"), grpc_port=jobs_port, proxy_target=f"127.0.0.1:{grpc_port}", grace_s=5, **(jobs or {})
    )
    async with AsyncExitStack() as stack:
        if is_fused:
            authenticator = authenticator_of(config)
            inference = JobsGuard(service, authenticator.models_of) if authenticator else service
            queue = await stack.enter_async_context(build(inference, settings))
            faces = await stack.enter_async_context(Faces(service, config, queue, authenticator))
        else:
            proxy = await stack.enter_async_context(
                RemoteInference(settings.proxy_target, stage="proxy", token=settings.proxy_token)
            )
            queue = await stack.enter_async_context(build(proxy, settings))
            await stack.enter_async_context(JobsFace(queue, settings.grpc_config, settings.byte_budget()))
            remote = RemoteJobs(config.jobs_target, max_message_bytes=config.max_message_bytes)
            await stack.enter_async_context(remote)
            faces = await stack.enter_async_context(Faces(service, config, remote))
        url, grpc_url = f"http://127.0.0.1:{faces.http.port}", f"127.0.0.1:{faces.grpc.port}"
        rest = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30, verify=False))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(grpc_url))
        yield Whole(rest, channel, backend, queue, url, grpc_url, faces, service)
        backend.gate.set()
