"""``python -m preprocess_service``: its life, from settings to stop."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import structlog

from preprocess_service import settings
from preprocess_service.any_server import AnyServer
from preprocess_service.loading import preprocessor_store
from preprocess_service.service import PreprocessService
from splitserve import __version__
from splitserve.oip import messages
from splitserve.oip.messages import ServerMetadata
from splitserve.remote.inference import RemoteInference
from splitserve.server import lifecycle, logs
from splitserve.server.grpc_face import GrpcFace


async def serve(config: settings.PreprocessSettings) -> None:
    logs.configure(level=config.log_level, format=config.log_format, service="preprocess", requests=config.log_requests)
    log = structlog.get_logger()
    stop = lifecycle.StopSignal()
    preprocessors = preprocessor_store(config)
    async with AsyncExitStack() as stack:
        executor = stack.enter_context(ThreadPoolExecutor(config.n_threads, thread_name_prefix="preprocess"))
        predict = await stack.enter_async_context(
            RemoteInference(
                config.predict_target, stage="predict", max_message_bytes=config.max_message_bytes, tls=config.next_tls
            )
        )
        service = PreprocessService(
            preprocessors,
            AnyServer(predict, models=preprocessors.catalogue.models),
            executor,
            allow_fingerprint_mismatch=config.allow_fingerprint_mismatch,
        )
        face = await stack.enter_async_context(
            GrpcFace(
                service,
                stage="preprocess",
                address=f"{config.host}:{config.grpc_port}",
                metadata=ServerMetadata(
                    "splitserve-preprocess", __version__, messages.extensions(allow_control=config.allow_repository_control)
                ),
                max_message_bytes=config.max_message_bytes,
                default_timeout_s=config.default_timeout_s,
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
        stack.callback(preprocessors.close)
        await stack.enter_async_context(
            lifecycle.background(
                lifecycle.keep_refreshing(preprocessors, interval_s=config.refresh_interval_s),
                lifecycle.keep_refreshing(service, interval_s=config.refresh_interval_s, why_waiting=service.not_ready_reason),
            )
        )
        await stop.wait()
        log.info("draining")
        await face.drain(delay_s=config.drain_delay_s, grace_s=config.grace_s)
    log.info("stopped")


if __name__ == "__main__":
    lifecycle.run(serve, lambda: settings.read(sys.argv[1:]), service="preprocess")
