"""What a service knows of the model repository: versions, releases and routes, and what of it is kept when it cannot be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

from splitserve.repository.manifest import BundleError, Kind
from splitserve.repository.release import History, Release
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.routes import Route
from splitserve.repository.selection import Selection
from splitserve.repository.source import BundleSource
from splitserve.versions import Pair

VANISHED = "its releases are no longer in the repository: loaded versions serve until the repository can be read"


class ModelView(msgspec.Struct, frozen=True):
    """One model. ``route`` is the last one that could be followed, ``route_problem`` why the present one cannot be.

    ``is_route_known``: there was such a route, or none at all, at some poll; not so after a restart with a broken one.
    ``problem`` says why the releases are not known, or not all; ``withdrawn`` has the releases that were taken back a short while
    ago, by pair, and are still callable.
    """

    published: frozenset[int] = frozenset()
    history: History = History()
    route: Route | None = None
    route_problem: str = ""
    is_route_known: bool = False
    problem: str = ""
    withdrawn: Mapping[Pair, Release] = {}

    @property
    def default_problem(self) -> str:
        """Why the release for requests that name no version is unknown; "" if it is known."""
        return "" if self.is_route_known else self.route_problem


class RepositoryView:
    """Follows a source by `poll`.

    A release that is withdrawn stays known for a grace. Releases that vanish together with all others of their model are not
    withdrawn: the repository cannot be read then, and the model stays as it was.

    Args:
        source: the model repository.
        kind: which half's versions are of interest.
        selection: which models.
        allow_unreleased_pairs: a route may name a pair that has no release.
        withdrawal_grace_s: how long a withdrawn release stays callable.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        source: BundleSource,
        kind: Kind,
        *,
        selection: Selection,
        allow_unreleased_pairs: bool,
        withdrawal_grace_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._kind = kind
        self._selection = selection
        self._allow_unreleased_pairs = allow_unreleased_pairs
        self._withdrawal_grace_s = withdrawal_grace_s
        self._clock = clock
        self._reader = ReleaseReader(source)
        self._callable_until: dict[tuple[str, Pair], float] = {}
        self.models: Mapping[str, ModelView] = {}

    def poll(self) -> None:
        """Read the source. Blocking.

        Raises:
            BundleError: it cannot be listed; what was known stays.
        """
        published: dict[str, set[int]] = {}
        for key in self._source.bundles():
            if self._selection.serves(key.model):
                versions = published.setdefault(key.model, set())
                if key.kind == self._kind:
                    versions.add(key.version)
        for model in self._source.released_models():  # its bundles may not be copied yet, or not be here
            if self._selection.serves(model):
                published.setdefault(model, set())
        known = {model for model, view in self.models.items() if view.history.records}
        self.models = {model: self._view(model, published.get(model)) for model in sorted(published.keys() | known)}

    def _view(self, model: str, published: set[int] | None) -> ModelView:
        before = self.models.get(model, ModelView())
        problem = ""
        try:
            history = self._reader.history(model) if published is not None else History()
            problem = "; ".join(self._reader.problems.get(model, ()))
        except BundleError as error:
            history, problem = before.history, str(error)
        if before.history.records and not history.records:
            return msgspec.structs.replace(
                before, problem=VANISHED, withdrawn=self._withdrawn(model, before.history, before), published=before.published
            )
        route, route_problem, is_route_known = self._route(model, history, before)
        return ModelView(
            frozenset(published or ()),
            history,
            route,
            route_problem,
            is_route_known,
            problem,
            self._withdrawn(model, history, before),
        )

    def _withdrawn(self, model: str, history: History, before: ModelView) -> dict[Pair, Release]:
        """Releases that were active before and are not now, until their grace is over."""
        now, gone = self._clock(), dict[Pair, Release]()
        if history is not before.history:
            active = history.by_pair()
            gone = {pair: release for pair, release in before.history.by_pair().items() if pair not in active}
            for pair in gone:
                self._callable_until.setdefault((model, pair), now + self._withdrawal_grace_s)
            for pair in active:
                self._callable_until.pop((model, pair), None)
        found = {**before.withdrawn, **gone}
        return {pair: release for pair, release in found.items() if self._callable_until.get((model, pair), now) > now}

    def _route(self, model: str, history: History, before: ModelView) -> tuple[Route | None, str, bool]:
        """The route to follow, why it is not the one in the repository, and whether it is known which one to follow."""
        try:
            route = self._source.route(model)
        except BundleError as error:
            problem = str(error)
        else:
            if route is None or self._can_follow(route, history):
                return route, "", True
            pair = route.named()[0]
            problem = f'{model}: route.json: {pair} has no release; "splitserve release {model} {pair}" makes one'
        if before.is_route_known and (before.route is None or self._can_follow(before.route, history)):
            return before.route, problem, True
        return None, problem, False

    def _can_follow(self, route: Route, history: History) -> bool:
        """Whether the route's pair has a release, or needs none."""
        return self._allow_unreleased_pairs or route.named()[0] in history.by_pair()
