"""Which pair serves requests that name no version. Preprocess alone decides this; the proxy follows what its index says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from preprocess_service.admission import AdmittedPair
from splitserve.catalogue import Catalogue, Defaults
from splitserve.oip.messages import READY, ModelState
from splitserve.server.agreement import Agreement
from splitserve.server.repository_view import ModelView
from splitserve.versions import Pair


class DefaultPairs(Defaults):
    """The default pair of each model: that of its route, else the newest release that is ready.

    A predictor that is on all replicas of predict is preferred, so that a request without a version finds it everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self._agreement: Agreement[Pair] = Agreement()

    def update(
        self,
        pairs: Catalogue[Pair, AdmittedPair],
        views: Mapping[str, ModelView],
        predict_indexes: Sequence[Sequence[ModelState]],
    ) -> None:
        """Decide again.

        Args:
            pairs: what can be served here.
            views: releases and routes by model.
            predict_indexes: the index of each replica of predict.
        """
        before, self._pairs, self._problems = self._pairs, {}, {}
        have = [{(state.name, state.version) for state in index if state.state == READY} for index in predict_indexes]
        for model in pairs.models():
            view = views.get(model, ModelView())
            ready = set(pairs.ready_versions(model))
            if view.default_problem:
                self._problems[model] = view.default_problem
            elif view.route is not None:
                pair = view.route.named()[0]
                if pair not in ready and before.get(model) in ready:
                    pair = before[model]  # the previous default serves until the route's pair is ready
                self._pairs[model] = pair
            elif candidates := [pair for pair in view.history.by_pair() if pair in ready] or sorted(ready):
                replicas = [{pair for pair in candidates if (model, str(pair.predictor)) in each} for each in have]
                self._pairs[model] = self._agreement.choose(model, candidates, replicas) or candidates[-1]
