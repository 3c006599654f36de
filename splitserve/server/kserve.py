"""The arguments that KServe passes to containers of transformers and predictors, as settings.

An argument overrides the environment variable of the same meaning. Arguments for features that we do not have are ignored, and so
are unknown ones: KServe's own servers ignore them too, and newer versions may pass more.

Source: kserve 0.21, ``kserve/model_server.py``; its controller adds ``--model_name`` and ``--predictor_host``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

PROTOCOL = "grpc-v2"

_PORT, _TLS_PORT = 80, 443
"""Default ports of a predictor. Source: kserve 0.21, ``InferenceGRPCClient``."""

_IGNORED = (
    "access_log_format", "configure_logging", "enable_docs_url", "enable_grpc", "enable_latency_logging", "event-loop",
    "grpc_max_receive_message_length", "grpc_max_send_message_length", "http_port", "log_config_file", "max_asyncio_workers",
    "max_threads", "predictor_request_retries", "protocol", "timeout-keep-alive", "workers",
)  # fmt: skip
"""Ignored: there is no HTTP port, and the rest are settings."""


class Transformer(NamedTuple):
    """Settings of preprocess, and whether predict is called over TLS."""

    settings: dict[str, Any]
    uses_tls: bool


def predictor(arguments: Sequence[str]) -> dict[str, Any]:
    """Settings of predict from its container's arguments."""
    return _settings(_parse(_parser("predict_service"), arguments))


def transformer(arguments: Sequence[str]) -> Transformer:
    """Settings of preprocess from its container's arguments.

    Exits with status 2 if the predictor's protocol is not gRPC, or its host is not a host.
    """
    parser = _parser("preprocess_service")
    parser.add_argument("--predictor_host", default="")
    parser.add_argument("--predictor_protocol", default=PROTOCOL)
    parser.add_argument("--predictor_use_ssl", type=_is_true, default=False)
    parser.add_argument("--predictor_request_timeout_seconds", dest="default_timeout_s", type=float)
    parser.add_argument("--enable_predictor_health_check", action="store_true", help=argparse.SUPPRESS)
    found = _parse(parser, arguments)
    if found.predictor_protocol != PROTOCOL:
        parser.error(
            f"--predictor_protocol: expected {PROTOCOL}, got {found.predictor_protocol[:32]}: predict is called over gRPC"
        )
    if "/" in found.predictor_host:
        parser.error(f"--predictor_host: expected a host, or host:port, got {found.predictor_host[:256]}")
    settings = _settings(found)
    if found.predictor_host:
        settings["predict_target"] = _target(found.predictor_host, _TLS_PORT if found.predictor_use_ssl else _PORT)
    if found.default_timeout_s is not None:
        settings["default_timeout_s"] = found.default_timeout_s
    return Transformer(settings, found.predictor_use_ssl)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        print(f"ignoring unknown arguments: {' '.join(unknown)}", file=sys.stderr)
    return found


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"python -m {program}", description="Settings are environment variables (docs/settings.md); these are KServe's.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--model_name", default="")
    parser.add_argument("--model_dir", default="")
    parser.add_argument("--grpc_port", type=int)
    parser.add_argument("--ssl_certfile", default="")
    parser.add_argument("--ssl_keyfile", default="")
    for name in _IGNORED:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser


def _settings(found: argparse.Namespace) -> dict[str, Any]:
    settings = {
        "MODELS": found.model_name,
        "MODEL_REPOSITORY": found.model_dir,
        "grpc_port": found.grpc_port,
        "tls_cert_file": found.ssl_certfile,
        "tls_key_file": found.ssl_keyfile,
    }
    return {name: value for name, value in settings.items() if value not in ("", None)}


def _target(host: str, port: int) -> str:
    has_port = ":" in host.rpartition("]")[2]
    return f"dns:///{host}" if has_port else f"dns:///{host}:{port}"


def _is_true(text: str) -> bool:
    """Source: distutils' ``strtobool``, which KServe uses."""
    if text.lower() in ("y", "yes", "t", "true", "on", "1"):
        return True
    if text.lower() in ("n", "no", "f", "false", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text[:32]}")
