"""``python -m splitserve.server.probe HOST:PORT [--ready]``: asks grpc.health.v1, exits 0 or 1. For container health checks.

Two questions, for two purposes:

- By default: does this process accept calls? Yes from the end of its first load until it drains, even with an empty repository or
  while the next service is unreachable. For liveness probes: restarting this service because another one fails would spread an
  outage.
- ``--ready``: can a model be inferred now, over all hops? For programs that wait for the system before they send requests.

A service with TLS is called over TLS if SPLITSERVE_CA_FILE names the authorities of its certificate; see docs/security.md.
"""

from __future__ import annotations

import argparse

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve import tls

ACCEPTS_CALLS = "inference.GRPCInferenceService"
READY = ""

TIMEOUT_S = 3.0


def problem(address: str, service: str, timeout_s: float = TIMEOUT_S) -> str:
    """Why the service is unhealthy; "" if it is healthy.

    Args:
        address: ``host:port``.
        service: `ACCEPTS_CALLS` or `READY`.
        timeout_s: of the call.
    """
    with _channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    serving = health_pb2.HealthCheckResponse.SERVING
    return "" if answer.status == serving else health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def _channel(address: str) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0)]  # a proxy in the environment is not for loopback
    files = tls.from_environment()
    if files is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, files.credentials(), [*options, *files.options()])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m splitserve.server.probe", description="Exits 0 if a service is healthy, else 1."
    )
    parser.add_argument("address", help="host:port of its gRPC face")
    parser.add_argument(
        "--ready", action="store_true", help="check that a model can be inferred, not only that calls are accepted"
    )
    arguments = parser.parse_args()
    if found := problem(arguments.address, READY if arguments.ready else ACCEPTS_CALLS):
        raise SystemExit(found)


if __name__ == "__main__":
    main()
