"""Settings that every service has. Each service's own class adds its prefix and what else it needs.

A field's docstring is its documentation: docs/settings.md is written from these classes.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from splitserve.server import logs

MIB = 1024 * 1024


class ServiceSettings(BaseSettings):
    """What every service can be told."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True, extra="ignore")

    host: str = "127.0.0.1"
    """Address to listen on. Loopback unless told otherwise: nothing here asks for credentials yet."""

    log_level: logs.Level = Field("info", validation_alias=AliasChoices("LOG_LEVEL"))
    """Least level that is logged: debug, info, warning or error."""

    log_format: logs.Format = Field("auto", validation_alias=AliasChoices("LOG_FORMAT"))
    """json, text, or auto: text on a terminal, JSON elsewhere."""

    max_message_bytes: int = Field(64 * MIB, gt=0)
    """Largest message taken or given, in bytes, over gRPC and as a REST body."""

    drain_delay_s: float = Field(0.0, ge=0)
    """Seconds to serve on after SIGTERM while saying "not ready", so that callers learn of it before calls are refused."""

    grace_s: float = Field(30.0, ge=0)
    """Seconds that calls in flight get to finish once no new ones are taken."""

    refresh_interval_s: float = Field(1.0, gt=0)
    """Seconds between two looks at what this service follows: the model repository, the service behind it."""


class RepositorySettings(ServiceSettings):
    """What the services that read the model repository can be told."""

    model_repository: str = Field("./models", validation_alias=AliasChoices("MODEL_REPOSITORY"))
    """Folder of the model repository."""


S = TypeVar("S", bound=ServiceSettings)


def read(settings: type[S], **overrides: Any) -> S:
    """Settings from the environment.

    A wrong value ends the process with status 2 and a line for each variable, before anything is bound.
    """
    try:
        return settings(**overrides)
    except ValidationError as error:
        for problem in error.errors():
            print(f"{variable_name(settings, str(problem['loc'][0]))}: {problem['msg']}", file=sys.stderr)
        raise SystemExit(2) from None


def variable_name(settings: type[ServiceSettings], location: str) -> str:
    """The environment variable that a field is read from."""
    field = settings.model_fields.get(location)
    if field is None:  # pydantic names a field by its alias
        return location
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return f"{settings.model_config.get('env_prefix', '')}{location}".upper()
