"""Which pair serves requests that name no version, where replicas of preprocess say so, and may say different things."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from proxy.known_pairs import GONE_GRACE_S, release_sequence
from splitserve.catalogue import Defaults, by_model
from splitserve.oip.messages import DEFAULT, READY, RELEASE_DIGEST, ModelState
from splitserve.server.agreement import Agreement
from splitserve.versions import Pair, parse_pair


class ReplicaPair(msgspec.Struct, frozen=True, order=True):
    """A pair as a replica reports it, in the order of releases. ``sequence`` is 0 where no release names it."""

    sequence: int
    pair: Pair
    digest: str = ""


class AgreedDefaults(Defaults):
    """The default pair of each model.

    Each replica names one. Where they differ, the newest of these that all replicas have is used, so that a request without a
    version never finds a replica without it.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._agreement: Agreement[ReplicaPair] = Agreement(clock=clock)
        self._named_at: dict[str, dict[Pair, float]] = {}
        """When replicas last named each pair as the default of a model."""

    def update(self, models: Iterable[str], indexes: Sequence[Sequence[ModelState]]) -> None:
        """Choose again, for these models, from the index of each replica."""
        now = self._clock()
        self._pairs, self._problems = {}, {}
        grouped = [by_model(index) for index in indexes]
        for model in models:
            named: set[ReplicaPair] = set()
            replicas: list[set[ReplicaPair]] = []
            problem = ""
            for index in grouped:
                states = index.get(model, [])
                ready = {_replica_pair(state) for state in states if state.version and state.state == READY}
                named |= {_replica_pair(state) for state in states if state.properties.get(DEFAULT) == "true"}
                problem = problem or next((state.reason for state in states if not state.version), "")
                replicas.append(ready)
            shared = set.intersection(*replicas) if replicas else set()
            candidates = named if named & shared else named | {each for each in shared if named and each <= max(named)}
            chosen = self._agreement.choose(model, sorted(candidates), replicas)
            if chosen is not None or named:
                self._pairs[model] = (chosen or max(named)).pair
            elif not named and problem and any(replicas):
                self._problems[model] = problem
            recent = {pair: at for pair, at in self._named_at.get(model, {}).items() if at > now - GONE_GRACE_S}
            self._named_at[model] = {**recent, **{each.pair: now for each in named}}

    def next_after(self, model: str, tried: Sequence[Pair]) -> Pair | None:
        """The pair to try after those, if any: the default, or another that a replica named as such a short while ago."""
        named_at, since = self._named_at.get(model, {}), self._clock() - GONE_GRACE_S
        recent = sorted((pair for pair, at in named_at.items() if at > since), key=named_at.__getitem__, reverse=True)
        default = [self._pairs[model]] if model in self._pairs else []
        return next((pair for pair in (*default, *recent) if pair not in tried), None)


def _replica_pair(state: ModelState) -> ReplicaPair:
    pair = parse_pair(state.name, state.version)
    assert pair is not None, "states without a version are left out"
    return ReplicaPair(release_sequence(state.properties), pair, state.properties.get(RELEASE_DIGEST, ""))
