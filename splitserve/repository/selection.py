"""Which versions of which models a service holds, from its settings and from routes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

import msgspec

from splitserve.errors import NotFound
from splitserve.repository.manifest import Kind
from splitserve.repository.release import History
from splitserve.repository.routes import Route
from splitserve.versions import MODEL_NAME, UNNAMED, Pair, parse_pair

_LATEST = re.compile(r"latest:([1-9][0-9]{0,8})")


class VersionPolicy(msgspec.Struct, frozen=True):
    """The ``n_latest`` newest versions that load (all if None), and the versions in the ``specific`` pairs."""

    n_latest: int | None = None
    specific: tuple[Pair, ...] = ()


class Selection(msgspec.Struct, frozen=True):
    """Models and versions from the settings.

    ``models``: names to serve, all if empty. ``policies``: by model; the one for ``""`` applies to all others.
    """

    models: frozenset[str] = frozenset()
    policies: Mapping[str, VersionPolicy] = {}

    def serves(self, model: str) -> bool:
        """Whether the model is selected."""
        return not self.models or model in self.models

    def policy(self, model: str) -> VersionPolicy:
        """Which versions of a model to hold."""
        return self.policies.get(model) or self.policies.get("") or VersionPolicy()


def parse_models(text: str) -> frozenset[str]:
    """Names separated by commas.

    Raises:
        ValueError: one cannot be a model's name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not MODEL_NAME.fullmatch(name):
            raise ValueError(f'"{name}" cannot be the name of a model')
    return frozenset(names)


def parse_policies(text: str) -> dict[str, VersionPolicy]:
    """Policies by model from e.g. ``latest:2; penguins=all; digits=1.1,2.1``.

    Raises:
        ValueError: names the part that is invalid.
    """
    policies = {"": VersionPolicy()}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        model, separator, value = part.partition("=")
        name, value = (model.strip(), value.strip()) if separator else ("", part)
        if separator and not MODEL_NAME.fullmatch(name):
            raise ValueError(f'"{name}" cannot be the name of a model')
        policies[name] = _parse_policy(value)
    return policies


def _parse_policy(value: str) -> VersionPolicy:
    if value == "all":
        return VersionPolicy()
    if match := _LATEST.fullmatch(value):
        return VersionPolicy(n_latest=int(match[1]))
    try:
        pairs = tuple(pair for name in value.split(",") if (pair := parse_pair("", name.strip())))
    except NotFound:
        pairs = ()
    if not pairs:
        raise ValueError(f'expected all, latest:N or pairs like 1.1,2.1; got "{value}"')
    return VersionPolicy(n_latest=0, specific=pairs)


def half(kind: Kind, pair: Pair) -> int:
    """The version of one half in a pair; `UNNAMED` where a third-party server has it."""
    return pair.preprocessor if kind == "preprocess" else pair.predictor


def selected(history: History, policy: VersionPolicy, route: Route | None, is_refused: Callable[[Pair], bool]) -> list[Pair]:
    """The pairs with a release whose halves are held, in no order.

    These are those of the policy, by the order of releases, that of the route, and one more that is older: a restart with a
    newest release that is refused serves the one before it.

    Args:
        history: the model's releases.
        policy: how many of the newest pairs, or which.
        route: the route that is followed.
        is_refused: whether a pair cannot be served; it does not count towards the policy.
    """
    pairs = history.by_pair()
    if policy.n_latest is None:
        return list(pairs)
    found = [pair for pair in {*policy.specific, *(route.named() if route else ())} if pair in pairs]
    n_wanted = policy.n_latest + 1 if policy.n_latest else 0
    for pair in reversed(pairs):
        if n_wanted == 0:
            break
        found.append(pair)
        n_wanted -= not is_refused(pair)
    return found


def pinned(kind: Kind, policy: VersionPolicy, route: Route | None) -> set[int]:
    """Versions of one half that are always held: those in specific pairs and in the route."""
    pairs = [*policy.specific, *(route.named() if route else ())]
    return {half(kind, pair) for pair in pairs} - {UNNAMED}


def wanted(published: Collection[int], refused: Collection[int], pins: Collection[int], n_latest: int | None) -> set[int]:
    """Versions to hold now.

    Args:
        published: all versions in the repository.
        refused: versions that failed to load; they do not count towards ``n_latest``.
        pins: versions to hold in any case.
        n_latest: how many of the newest other versions; all if None.
    """
    newest = sorted(set(published) - set(refused), reverse=True)
    return {version for version in published if version in pins} | set(newest if n_latest is None else newest[:n_latest])
