"""Settings that every service has. Each service's own class adds its prefix and what else it needs.

A field's docstring is its documentation: docs/settings.md is written from these classes.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from splitserve import sources
from splitserve.selection import Selection, parse_models, parse_policies
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

    allow_repository_control: bool = Field(False, validation_alias=AliasChoices("ALLOW_REPOSITORY_CONTROL"))
    """Take requests to load and unload models, from anyone who can reach the port. Polling needs none of it."""

    refresh_interval_s: float = Field(1.0, gt=0)
    """Seconds between two looks at what this service follows: the model repository, the service behind it."""


class RepositorySettings(ServiceSettings):
    """What the services that read the model repository can be told."""

    model_repository: str = Field("./models", validation_alias=AliasChoices("MODEL_REPOSITORY"))
    """The model repository: a folder, or a URL that begins with s3://, gs://, az://, http:// or https:// (docs/loading.md)."""

    model_cache: str = Field("", validation_alias=AliasChoices("MODEL_CACHE"))
    """Folder that files from a URL are kept in; below ~/.cache or, if that can not be written, the folder for temporary files."""

    model_poll_interval_s: float = Field(10.0, ge=0, validation_alias=AliasChoices("MODEL_POLL_INTERVAL_S"))
    """Seconds between two listings of a repository that is a URL. A folder is looked at every refresh interval."""

    model_fetch_timeout_s: float = Field(60.0, gt=0, validation_alias=AliasChoices("MODEL_FETCH_TIMEOUT_S"))
    """Seconds that a step of a fetch from a URL may take: a listing, or 4 MiB of a file."""

    models: str = Field("", validation_alias=AliasChoices("MODELS"))
    """Names of the models to serve, separated by commas; all when empty."""

    model_versions: str = Field("latest:2", validation_alias=AliasChoices("MODEL_VERSIONS"))
    """Versions of each half to hold: all, latest:N, or those of pairs like 1.1,2.1; by model as in `latest:2; penguins=all`."""

    unload_delay_s: float = Field(30.0, ge=0)
    """Seconds that a version which is no longer wanted is kept after it was last asked for."""

    @property
    def selection(self) -> Selection:
        """Which models and versions are wanted."""
        return Selection(parse_models(self.models), parse_policies(self.model_versions))

    @property
    def look_interval_s(self) -> float:
        """Time between two looks at the model repository, if it is not looked at in every refresh."""
        return self.model_poll_interval_s if sources.is_url(self.model_repository) else 0.0

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
