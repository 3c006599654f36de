"""``python -m predict_service``: its life, from settings to stop."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import structlog

from predict_service.loading import predictor_store
from predict_service.service import PredictService
from predict_service.settings import PredictSettings
from splitserve import __version__
from splitserve.oip import messages
from splitserve.oip.messages import ServerMetadata
from splitserve.server import kserve, lifecycle, logs, settings
from splitserve.server.grpc_face import GrpcFace


async def serve(config: PredictSettings) -> None:
    logs.configure(level=config.log_level, format=config.log_format, service="predict", requests=config.log_requests)
    log = structlog.get_logger()
    stop = lifecycle.StopSignal()
    predictors = predictor_store(config)
    async with AsyncExitStack() as stack:
        executor = stack.enter_context(ThreadPoolExecutor(config.n_threads, thread_name_prefix="predict"))
        service = PredictService(predictors, executor, limits=config.batch_limits)
        face = await stack.enter_async_context(
            GrpcFace(
                service,
                stage="predict",
                address=f"{config.host}:{config.grpc_port}",
                metadata=ServerMetadata(
                    "splitserve-predict", __version__, messages.extensions(allow_control=config.allow_repository_control)
                ),
                max_message_bytes=config.max_message_bytes,
                allow_control=config.allow_repository_control,
                statistics=service.statistics,
                tls=config.tls,
                limits=config.limits,
                budget=config.byte_budget(),
                connections=config.grpc_limits,
                shares_port=config.shares_ports,
            )
        )
        log.info("listening", grpc_port=face.port)
        stack.callback(predictors.close)
        await stack.enter_async_context(
            lifecycle.background(lifecycle.keep_refreshing(predictors, interval_s=config.refresh_interval_s))
        )
        await stop.wait()
        log.info("draining")
        await face.drain(delay_s=config.drain_delay_s, grace_s=config.grace_s)
    log.info("stopped")


if __name__ == "__main__":
    lifecycle.run(serve, lambda: settings.read(PredictSettings, **kserve.predictor(sys.argv[1:])), service="predict")
