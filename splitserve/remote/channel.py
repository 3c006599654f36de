"""Options and calls of every gRPC channel that splitserve opens: message limits, reconnection, health checks, keepalive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from splitserve.oip import protobuf


class Keepalive(msgspec.Struct, frozen=True):
    """When a channel sends keepalive PINGs.

    ``time_ms`` without traffic lead to a PING; ``timeout_ms`` without its acknowledgement end the connection. ``without_calls``:
    also while no call is in flight.
    """

    time_ms: int
    timeout_ms: int
    without_calls: bool = False


BETWEEN_SERVICES = Keepalive(2_000, 2_000, without_calls=True)
"""A stage that hangs is detected within about four seconds."""

TO_ANY_SERVER = Keepalive(60_000, 10_000)
"""Servers other than splitserve's end connections that send PINGs much more often."""


def channel_options(
    max_message_bytes: int, keepalive: Keepalive, *, health_service: str = protobuf.SERVICE
) -> list[tuple[str, Any]]:
    """Options of a channel that outlives its server: a dead connection is detected, a restarted server is found at once.

    Args:
        max_message_bytes: the largest message sent or received.
        keepalive: depends on who the peer is.
        health_service: the service whose health is watched: a peer that drains or loads gets no calls. "": none is.

    Source: gRPC, "Health Checking": round_robin supports it, pick_first does not.
    """
    # Retries are not gRPC's: ours know the deadline, the replica and the budget.
    service_config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if health_service:
        service_config["healthCheckConfig"] = {"serviceName": health_service}
    return [
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 200),
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        # keepalive_timeout_ms alone does not end a silent connection; ping_timeout_ms does.
        ("grpc.keepalive_time_ms", keepalive.time_ms),
        ("grpc.keepalive_timeout_ms", keepalive.timeout_ms),
        ("grpc.http2.ping_timeout_ms", keepalive.timeout_ms),
        ("grpc.keepalive_permit_without_calls", int(keepalive.without_calls)),
        ("grpc.use_local_subchannel_pool", 1),
        # A proxy in the environment is for traffic that leaves the cluster.
        ("grpc.enable_http_proxy", 0),
    ]


def unary_methods(channel: Any, service: str, messages: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """What calls each unary method of a service.

    Args:
        channel: of `grpc.aio`.
        service: its full name.
        messages: types of request and response by name of the method.
    """
    return {
        name: channel.unary_unary(
            f"/{service}/{name}", request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        for name, (request, response) in messages.items()
    }
