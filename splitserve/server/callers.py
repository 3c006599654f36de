"""Authentication of callers: the interface that faces use, and where services find the caller."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from contextvars import Context, ContextVar
from typing import Protocol

import msgspec
import structlog

from splitserve.errors import SplitserveError
from splitserve.oip.permission import is_permitted


class Caller(msgspec.Struct, frozen=True):
    """An authenticated caller: ``models`` are shell patterns (``penguins-*``); operators load, unload, and see every model.

    ``name`` is for logs, where it may be cut. ``owner`` is whom its jobs belong to, which no two callers share; "": nothing tells
    it apart from others.
    """

    name: str
    models: tuple[str, ...] = ()
    is_operator: bool = False
    owner: str = ""

    def may_call(self, model: str) -> bool:
        """Whether one of the patterns matches the model's name."""
        return is_permitted(self.models, model)


NOBODY = Caller("")
"""A caller without credentials, or with wrong ones."""

current: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""The caller of the call that this context serves; None outside of calls and where they are not authenticated."""


class Authenticator(Protocol):
    """Identifies callers by the values of a call's ``authorization`` headers."""

    def recognise(self, credentials: Sequence[str]) -> Caller | None:
        """The caller, if the credentials can be checked at once; None if `identify` has to.

        Raises:
            Unauthenticated: the credentials are missing or not valid.
        """
        ...

    async def identify(self, credentials: Sequence[str]) -> Caller:
        """The caller of credentials for which `recognise` returned None.

        Raises:
            Unauthenticated: the credentials are not valid.
            Unavailable: they cannot be checked now.
        """
        ...


async def identify(authenticator: Authenticator | None, credentials: Sequence[str], *, is_open: bool) -> None:
    """Make the caller that of the running task, before anything of its call is decoded.

    Args:
        authenticator: None: calls are not authenticated.
        credentials: the values of the call's ``authorization`` headers.
        is_open: the call needs no credentials, so wrong ones are ignored.

    Raises:
        Unauthenticated, Unavailable: as `Authenticator.identify`, unless ``is_open``.
    """
    if authenticator is None:
        return
    current.set(NOBODY)
    try:
        caller = authenticator.recognise(credentials) or await authenticator.identify(credentials)
    except SplitserveError:
        if not is_open:
            raise
        return
    _enter(caller)


def context_of(caller: Caller) -> Context:
    """A context in which ``caller`` is the `current` one, for what runs in no task of its own."""
    context = contextvars.copy_context()
    context.run(_enter, caller)
    return context


def _enter(caller: Caller) -> None:
    current.set(caller)
    structlog.contextvars.bind_contextvars(caller=caller.name)
