"""Settings that every service has. Each service's own class adds its prefix and what else it needs.

A field's docstring is its documentation: docs/settings.md is written from these classes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import SettingsConfigDict

from splitserve.batching.queue import BatchLimits
from splitserve.repository import sources
from splitserve.repository.selection import Selection, parse_models, parse_policies
from splitserve.repository.signing import Verifier
from splitserve.server import cores, logs
from splitserve.server.admin_settings import MAX_PORT, AdminSettings
from splitserve.telemetry.recorders import latency_bounds
from splitserve.versions import MODEL_NAME

MIB = 1024 * 1024


MAX_THRESHOLDS = 16
MAX_THRESHOLD_MS = 3_600_000.0

_TARGET = re.compile(
    r"(?:dns:(?://[^/]*/)?)?(?:\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})|(?!dns:)[a-z][a-z0-9-]*:(?!\d+$)\S+"
)
"""``host:port``, the same after ``dns:///``, or a gRPC name of another scheme. Source: gRPC Name Resolution."""


def check_target(text: str) -> str:
    """A gRPC target as it is.

    Raises:
        ValueError: nothing can be reached by it.
    """
    match = _TARGET.fullmatch(text)
    if match is None or (match["port"] and not 0 < int(match["port"]) <= MAX_PORT):
        raise ValueError(f'expected a gRPC target as "host:port" or "dns:///host:port", got "{text}"')
    return text


Target = Annotated[str, AfterValidator(check_target)]


class ServiceSettings(AdminSettings):
    """Settings of every service."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True, extra="ignore", allow_inf_nan=False)

    host: str = "127.0.0.1"
    """Address to listen on. Read docs/security.md before listening beyond loopback."""

    log_level: logs.Level = Field("info", validation_alias=AliasChoices("LOG_LEVEL"))
    """Minimum level that is logged: debug, info, warning or error."""

    log_format: logs.Format = Field("auto", validation_alias=AliasChoices("LOG_FORMAT"))
    """json, text, or auto: text on a terminal, JSON elsewhere."""

    log_requests: str = Field("failed", validation_alias=AliasChoices("LOG_REQUESTS"))
    """Which requests are logged: failed, sampled:N (those and one in N others), or all, which costs about as much CPU as
    answering them."""

    slo_latency_ms: str = Field("", validation_alias=AliasChoices("SLO_LATENCY_MS"))
    """Latency thresholds of service level objectives, in milliseconds, separated by commas: `37, 250`. Each is a bucket
    bound of the durations of requests in the metrics, besides those of docs/metrics.md."""

    max_message_bytes: int = Field(64 * MIB, gt=0)
    """Maximum size of a gRPC message or REST body, received or sent, in bytes."""

    drain_delay_s: float = Field(0.0, ge=0)
    """Seconds to keep serving after SIGTERM while reporting "not ready", so that callers notice before calls are refused."""

    grace_s: float = Field(30.0, ge=0)
    """Seconds that calls in flight may take to finish once new ones are refused."""

    allow_repository_control: bool = Field(False, validation_alias=AliasChoices("ALLOW_REPOSITORY_CONTROL"))
    """Accept requests to load and unload models: at the proxy from operators if it has an authorization file, else from
    everybody who can reach the port. Polling does not need it."""

    workers: int = Field(1, ge=1)
    """Processes that share the ports, for hosts with more cores; also the option `--workers`. Each has its own models, statistics
    and limits."""

    refresh_interval_s: float = Field(1.0, gt=0)
    """Seconds between two checks of the model repository and of the next service."""

    @field_validator("log_requests")
    @classmethod
    def _check_log_requests(cls, text: str) -> str:
        logs.every_of(text)
        return text

    @field_validator("slo_latency_ms")
    @classmethod
    def _check_slo_latency(cls, text: str) -> str:
        parse_thresholds(text)
        return text

    @property
    def latency_bounds(self) -> tuple[float, ...]:
        """Bucket bounds of the durations of requests, in seconds."""
        return latency_bounds(parse_thresholds(self.slo_latency_ms))

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports that it listens on."""
        return tuple(getattr(self, name) for name in ("http_port", "grpc_port") if name in type(self).model_fields)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the ports."""
        return self.host in ("127.0.0.1", "::1", "localhost")

    @property
    def shares_ports(self) -> bool:
        """Whether several processes share the ports."""
        return self.workers > 1

    @property
    def n_cores(self) -> int:
        """Cores per worker, at least 1."""
        return max(1, cores.available() // self.workers)


class ComputeSettings(ServiceSettings):
    """Settings of services that run models or transforms."""

    compute_threads: int = Field(0, ge=0)
    """Threads for models or transforms, so that health checks are answered meanwhile; 0: one per core, at least 2. Short work
    runs in the event loop."""

    @property
    def n_threads(self) -> int:
        """Number of threads for models or transforms."""
        return self.compute_threads or max(2, self.n_cores)


class BatchingSettings(ServiceSettings):
    """Settings of services that merge requests."""

    max_batch_size: int = Field(256, ge=1)
    """Maximum number of rows of a merged call. A single request with more is sent alone."""

    max_batch_bytes: int = Field(MIB, ge=1)
    """Maximum bytes of a merged call; merging does not speed up large ones."""

    max_queue_size: int = Field(4096, ge=1)
    """Maximum number of queued requests per model and version; more are refused at once."""

    max_in_flight: int = Field(0, ge=0)
    """Maximum calls in flight per model, version and replica. 0: adaptive; one, and more if rows or calls are slow."""

    max_queue_delay_ms: float = Field(0.0, ge=0)
    """Milliseconds that a request waits for others although no call is in flight: fewer calls at a higher latency."""

    max_queue_wait_ms: float = Field(1000.0, ge=0)
    """Target for the queue wait, in milliseconds: the number of accepted requests adapts to it, and more are refused at once. 0:
    only max_queue_size applies."""

    max_background_wait_ms: float = Field(20.0, ge=0)
    """Requests of jobs are refused, and their worker slows down, while other requests wait longer than this in the queue, in
    milliseconds. 0: never."""

    background_share: float = Field(0.05, ge=0)
    """Rows of jobs that are sent for each row of other requests, while there are others. In pauses jobs take small calls of their
    own, and with no other request for a second as many rows as a call may have."""

    batching: str = ""
    """Limits that differ for some models: `imagenet: max_in_flight=4, max_batch_size=8; penguins: max_queue_delay_ms=2`."""

    def batch_limits(self, model: str) -> BatchLimits:
        """The limits for a model."""
        own = parse_limits(self.batching).get(model, {})
        return BatchLimits(**{name: own.get(name, getattr(self, name)) for name in BatchLimits.__struct_fields__})

    @field_validator("batching")
    @classmethod
    def _check_batching(cls, text: str) -> str:
        parse_limits(text)
        return text


def parse_limits(text: str) -> dict[str, dict[str, float]]:
    """Limits by model from e.g. ``imagenet: max_in_flight=4, max_batch_size=8; penguins: max_queue_delay_ms=2``.

    Raises:
        ValueError: names the part that is not understood.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        model, separator, assignments = part.partition(":")
        if not separator or not MODEL_NAME.fullmatch(model.strip()):
            raise ValueError(f'"{part}" does not begin with the name of a model and a colon')
        found[model.strip()] = dict(_parse_limit(each.strip()) for each in assignments.split(","))
    return found


def parse_thresholds(text: str) -> tuple[float, ...]:
    """Seconds from milliseconds, e.g. ``37, 250``.

    Raises:
        ValueError: names the part that is not understood.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) > MAX_THRESHOLDS:
        raise ValueError(f"expected at most {MAX_THRESHOLDS} thresholds, got {len(parts)}")
    found = []
    for part in parts:
        try:
            threshold_ms = float(part)
        except ValueError:
            threshold_ms = 0.0
        if not 0 < threshold_ms <= MAX_THRESHOLD_MS:
            raise ValueError(f'"{part[:32]}": expected milliseconds above 0 and up to {MAX_THRESHOLD_MS:.0f}')
        found.append(threshold_ms / 1000)
    return tuple(found)


def _parse_limit(text: str) -> tuple[str, float]:
    name, _, value = (each.strip() for each in text.partition("="))
    if name not in BatchLimits.__struct_fields__:
        raise ValueError(f'"{text}" is none of {", ".join(f"{field}=N" for field in BatchLimits.__struct_fields__)}')
    try:
        number = float(value) if name.endswith("_ms") else int(value)
    except ValueError:
        number = -1
    if number < (0 if name.endswith("_ms") or name == "max_in_flight" else 1):
        raise ValueError(f'"{text}": {value!r} is not a number that {name} can be')
    return name, number


class RepositorySettings(ServiceSettings):
    """Settings of services that read the model repository."""

    model_repository: str = Field("./models", validation_alias=AliasChoices("MODEL_REPOSITORY"))
    """The model repository: a folder, a URL that begins with s3://, gs://, az://, http:// or https://, or
    mlflow:MODEL@ALIAS (docs/loading.md). A folder may also be that of one model, or one bundle."""

    model_cache: str = Field("", validation_alias=AliasChoices("MODEL_CACHE"))
    """Cache folder for files from a URL; by default below ~/.cache or, if that is not writable, the folder for temporary
    files."""

    model_poll_interval_s: float = Field(10.0, ge=0, validation_alias=AliasChoices("MODEL_POLL_INTERVAL_S"))
    """Seconds between two listings of a repository that is a URL. A folder is listed every refresh interval."""

    model_fetch_timeout_s: float = Field(60.0, gt=0, validation_alias=AliasChoices("MODEL_FETCH_TIMEOUT_S"))
    """Time limit, in seconds, of one step of a fetch from a URL: a listing, or 4 MiB of a file."""

    models: str = Field("", validation_alias=AliasChoices("MODELS"))
    """Names of the models to serve, separated by commas; all when empty."""

    model_versions: str = Field("latest:2", validation_alias=AliasChoices("MODEL_VERSIONS"))
    """Releases to hold: all, latest:N, or those of pairs like 1.1,2.1; by model as in `latest:2; penguins=all`. One more than N
    is held, and refused ones do not count: a restart with newest releases that are refused serves the one before them."""

    unload_delay_s: float = Field(30.0, ge=0)
    """Seconds that a version which is no longer wanted is kept after it was last asked for. A withdrawn release stays callable
    for at least this long."""

    allow_unreleased_pairs: bool = False
    """Serve pairs that no release names: for trying things, for a third-party predict server, and for a repository that is one
    bundle. Preprocess and predict each need it."""

    model_signature_key: str = Field("", validation_alias=AliasChoices("MODEL_SIGNATURE_KEY"))
    """File with a public key in PEM form: only bundles signed by its private key are loaded. Needs the extra `signing`."""

    @property
    def selection(self) -> Selection:
        """The selected models and versions."""
        return Selection(parse_models(self.models), parse_policies(self.model_versions))

    @property
    def poll_interval_s(self) -> float:
        """Time between two polls of the model repository, if it is not polled in every refresh."""
        return self.model_poll_interval_s if sources.is_url(self.model_repository) else 0.0

    def count_cached(self) -> int:
        """Bytes in the cache of model files; 0 if there is none."""
        return sources.count_cached(self.model_repository, self.model_cache)

    @property
    def withdrawal_grace_s(self) -> float:
        """How long preprocess keeps a withdrawn release callable. Predict keeps it twice as long.

        Longer than one poll and both refreshes, so that by then every replica and the proxy know of it.
        """
        return max(self.unload_delay_s, 2 * (self.poll_interval_s + 2 * self.refresh_interval_s))

    @field_validator("model_repository")
    @classmethod
    def _check_repository(cls, where: str) -> str:
        sources.check(where)
        return where

    @field_validator("models")
    @classmethod
    def _check_models(cls, text: str) -> str:
        parse_models(text)
        return text

    @field_validator("model_versions")
    @classmethod
    def _check_versions(cls, text: str) -> str:
        parse_policies(text)
        return text

    @field_validator("model_signature_key")
    @classmethod
    def _check_signature_key(cls, text: str) -> str:
        if text:
            Verifier(Path(text))
        return text


S = TypeVar("S", bound=ServiceSettings)


def read(settings: type[S], **overrides: Any) -> S:
    """Settings from the environment.

    An invalid value, or a model repository that is a folder and does not exist, ends the process with status 2 and a line for
    each variable, before anything is bound.
    """
    try:
        config = settings(**overrides)
    except ValidationError as error:
        for problem in error.errors():
            print(f"{variable_name(settings, str(problem['loc'][0]))}: {problem['msg']}", file=sys.stderr)
        raise SystemExit(2) from None
    if isinstance(config, RepositorySettings) and (reason := sources.missing(config.model_repository)):
        print(f"MODEL_REPOSITORY: {reason}", file=sys.stderr)
        raise SystemExit(2)
    if (
        isinstance(config, RepositorySettings)
        and config.model_signature_key
        and config.model_repository.startswith(sources.MLFLOW)
    ):
        print("MODEL_SIGNATURE_KEY: expected none with MODEL_REPOSITORY=mlflow:…: an alias has no signature", file=sys.stderr)
        raise SystemExit(2)
    return config


def variable_name(settings: type[ServiceSettings], location: str) -> str:
    """The environment variable that a field is read from."""
    field = settings.model_fields.get(location)
    if field is None:  # pydantic names a field by its alias
        return location
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return f"{settings.model_config.get('env_prefix', '')}{location}".upper()
