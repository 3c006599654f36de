"""``python -m splitserve.server.probe HOST:PORT [--ready]``: asks grpc.health.v1, exits 0 or 1. For container health checks.

Two questions, because two things are done with the answers:

- By default: does this process take calls? Only itself matters: yes from the end of its first loading until it drains, even with
  an empty repository or while the service behind it is away. What restarts containers may act on this; restarting this one for
  what another one lacks would spread an outage.
- ``--ready``: can something be inferred now, over all hops? What waits for the system before it sends requests wants this.

A service that listens over TLS is asked over TLS where SPLITSERVE_CA_FILE names what its certificate is signed by; see
docs/security.md.
"""

from __future__ import annotations

import argparse

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve import tls

TAKES_CALLS = "inference.GRPCInferenceService"
READY = ""

TIMEOUT_S = 3.0


def problem(address: str, service: str, timeout_s: float = TIMEOUT_S) -> str:
    """Why the service is not well, or an empty string.

    Args:
        address: ``host:port``.
        service: `TAKES_CALLS` or `READY`.
        timeout_s: how long the answer may take.
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
        prog="python -m splitserve.server.probe", description="Exits 0 if a service is well, else 1."
    )
    parser.add_argument("address", help="host:port of its gRPC face")
    parser.add_argument(
        "--ready", action="store_true", help="ask whether something can be inferred, not only whether it takes calls"
    )
    arguments = parser.parse_args()
    if found := problem(arguments.address, READY if arguments.ready else TAKES_CALLS):
        raise SystemExit(found)


if __name__ == "__main__":
    main()
