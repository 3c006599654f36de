"""The models that a service knows: their versions, the state of each, and the object that serves it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

import msgspec

from splitserve.errors import NotFound, Unavailable
from splitserve.oip.messages import READY, UNAVAILABLE, ModelState
from splitserve.versions import UNNAMED, Pair, is_named, unknown_model

MAX_LISTED_VERSIONS = 20
"""Versions that the error for an unknown one lists."""

STILL_LOADING = "models are still being loaded"

V = TypeVar("V", int, Pair)
T = TypeVar("T")


class Entry(msgspec.Struct, Generic[T], frozen=True):
    """One version: its state, the reason why it is not ready, and the object that serves it, if any."""

    state: str
    reason: str = ""
    value: T | None = None


class Catalogue(Generic[V, T]):
    """Versions by model. A version that can be served has a value; any other has a reason."""

    def __init__(self) -> None:
        self._models: dict[str, dict[V, Entry[T]]] = {}
        self._incomplete: dict[str, str] = {}

    def put(self, model: str, version: V, entry: Entry[T]) -> None:
        """Add or replace a version."""
        self._models.setdefault(model, {})[version] = entry

    def put_incomplete(self, model: str, reason: str) -> None:
        """Add a model that has no version to serve."""
        self._incomplete[model] = reason

    def remove(self, model: str, version: V) -> None:
        """Remove a version."""
        versions = self._models.get(model, {})
        versions.pop(version, None)
        if not versions:
            self._models.pop(model, None)

    def remove_incomplete(self, model: str) -> None:
        """Undo `put_incomplete`."""
        self._incomplete.pop(model, None)

    def __contains__(self, key: tuple[str, V]) -> bool:
        return key[1] in self._models.get(key[0], {})

    def models(self) -> list[str]:
        """Names of all models, sorted."""
        return sorted(self._models.keys() | self._incomplete.keys())

    def entries(self, model: str) -> dict[V, Entry[T]]:
        """All versions of a model, ascending."""
        return dict(sorted(self._models.get(model, {}).items()))

    def ready_versions(self, model: str) -> tuple[V, ...]:
        """Versions of a model that are ready, ascending."""
        return tuple(version for version, entry in self.entries(model).items() if entry.state == READY)

    def choose(self, model: str, version: V | None) -> tuple[V, T]:
        """A version that can be served, and the object that serves it.

        Args:
            model: its name.
            version: None: the newest that is ready, otherwise the newest that has a value.

        Raises:
            NotFound: no such model, or no such version of it.
            Unavailable: it is known and cannot be served.
        """
        entries = self._models.get(model)
        if not entries:
            if model in self._incomplete:
                raise Unavailable(f'model "{model}" cannot be served: {self._incomplete[model]}', model=model)
            raise NotFound(unknown_model(model), model=model[:128])
        if version is None:
            version = max(entries, key=lambda each: (entries[each].state == READY, entries[each].value is not None, each))
        elif version not in entries:
            raise self.not_found(model, version)
        entry = entries[version]
        if entry.value is None:
            reason = entry.reason or entry.state.lower()
            raise Unavailable(f'model "{model}" version {version} is not ready: {reason}', model=model, pair=str(version))
        return version, entry.value

    def not_found(self, model: str, version: V | str) -> NotFound:
        """The error for a version that a model does not have.

        It lists those that it has, the newest first, and says how a pair becomes one.
        """
        versions = [str(each) for each in sorted(self._models.get(model, ()), reverse=True)[:MAX_LISTED_VERSIONS]]
        listed = f"; its versions: {', '.join(versions)}" if versions else ""
        hint = f"; {how_to_release(model, version)}" if isinstance(version, Pair) and version.predictor != UNNAMED else ""
        return NotFound(f"{unknown_model(model)}, version {str(version)[:32]}{listed}{hint}", model=model[:128])

    def index(self) -> list[ModelState]:
        """All versions, ready or not. An incomplete model has the version ""."""
        versions = [
            ModelState(model, str(version), entry.state, entry.reason)
            for model in sorted(self._models)
            for version, entry in self.entries(model).items()
        ]
        return versions + [ModelState(model, "", UNAVAILABLE, reason) for model, reason in sorted(self._incomplete.items())]


def by_model(index: Iterable[ModelState]) -> dict[str, list[ModelState]]:
    """The states of an index, grouped by the name of the model."""
    found: dict[str, list[ModelState]] = {}
    for state in index:
        found.setdefault(state.name, []).append(state)
    return found


class Defaults:
    """The pairs that serve requests without a version. A subclass decides them."""

    def __init__(self) -> None:
        self._pairs: dict[str, Pair] = {}
        self._problems: dict[str, str] = {}
        """By model, why a request has to name a version."""

    def get(self, model: str) -> Pair | None:
        """The default of a model; None if it has none."""
        return self._pairs.get(model)

    def choose(self, model: str) -> Pair | None:
        """The default of a model for a request; None leaves the choice to the catalogue.

        Raises:
            Unavailable: the default is unknown.
        """
        if problem := self._problems.get(model):
            raise Unavailable(f'model "{model}": no release is chosen: {problem}; name a version', model=model)
        return self._pairs.get(model)


def how_to_release(model: str, pair: Pair) -> str:
    """What to do where no release names a pair."""
    return f'"splitserve release {model[:128]} {pair}" proves a pair of published halves and makes it one'


def merged_index(indexes: Iterable[Iterable[ModelState]]) -> list[ModelState]:
    """What several replicas have together: a version is ready if it is on one of them."""
    merged: dict[tuple[str, str], ModelState] = {}
    for index in indexes:
        for state in index:
            known = merged.get((state.name, state.version))
            if known is None or (known.state != READY and state.state == READY):
                merged[(state.name, state.version)] = state
    return list(merged.values())


def why_model_not_ready(states: Iterable[ModelState], model: str, version: str) -> str:
    """Why a model, or this version of it, is not ready in a service with this index; "" if it is."""
    asked = [state for state in states if state.name == model and is_named(state.version, version)]
    if any(state.state == READY for state in asked):
        return ""
    if not asked:
        return unknown_model(model) + (f", version {version[:32]}" if version else "")
    return "; ".join(f"{model} {state.version}".strip() + f": {state.reason or state.state.lower()}" for state in asked)


def why_not_ready(states: Iterable[ModelState]) -> str:
    """Why a service with this index has no ready model; "" if it has."""
    affected: dict[str, list[str]] = {}
    for state in states:
        if state.state == READY:
            return ""
        affected.setdefault(state.reason or state.state.lower(), []).append(f"{state.name} {state.version}".strip())
    if not affected:
        return "no models found"
    reasons = [f"{', '.join(names[:5])}{' and others' if len(names) > 5 else ''}: {why}" for why, names in affected.items()]
    return f"no model is ready: {'; '.join(reasons[:5])}"
