"""Lines for auditors of calls that change what a service serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from splitserve.server import callers
from splitserve.server.audit import MAX_LENGTH, record
from splitserve.server.logs import status_of


@contextmanager
def recorded(verb: str, *, source: str, model: Callable[[], str], **facts: str | None) -> Iterator[None]:
    """Write a line for what the ``with`` block does for the caller of now.

    Args:
        verb: what it does.
        source: the caller's address.
        model: gives the model that it concerns; called at the end, when it is known who the caller is.
        facts: more; those that are None are left out.
    """
    result = "OK"
    try:
        yield
    except BaseException as error:
        result = status_of(error)
        raise
    finally:
        caller = callers.current.get()
        known = {key: value[:MAX_LENGTH] for key, value in facts.items() if value is not None}
        record(verb, result=result, principal=caller.name if caller else "", source=source, model=model(), **known)
