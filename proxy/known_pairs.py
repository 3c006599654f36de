"""What the proxy knows of preprocess's pairs: state, signature and release of each, as of the last refresh."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from splitserve.catalogue import Catalogue, Entry
from splitserve.errors import NotFound, Unavailable
from splitserve.oip.messages import READY, RELEASE_DIGEST, RELEASE_SEQUENCE, InferenceService, ModelMetadata, ModelState
from splitserve.versions import UNNAMED, Pair, parse_pair

GONE_GRACE_S = 60.0
"""How long a pair that has left preprocess's index is still sent there, where it stays callable for a grace."""


class KnownPairs:
    """The pairs of all replicas of preprocess together.

    Args:
        preprocess: the next service, asked for signatures.
        clock: seconds that never go back.
    """

    def __init__(self, preprocess: InferenceService, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._preprocess = preprocess
        self._clock = clock
        self.catalogue: Catalogue[Pair, ModelMetadata] = Catalogue()
        self._properties: dict[tuple[str, Pair], Mapping[str, str]] = {}
        self._gone: dict[tuple[str, Pair], tuple[float, ModelMetadata]] = {}
        """Pairs that have left the index: until when they are callable, and their signatures."""

    async def update(self, indexes: Sequence[Sequence[ModelState]]) -> None:
        """Take over the pairs of these indexes, one of each replica. A pair is ready if it is ready on one replica.

        Raises:
            SplitserveError: a signature cannot be fetched. Nothing has changed.
        """
        pairs: Catalogue[Pair, ModelMetadata] = Catalogue()
        properties: dict[tuple[str, Pair], Mapping[str, str]] = {}
        for state in chain.from_iterable(indexes):
            if not state.version:
                pairs.put_incomplete(state.name, state.reason)
            elif pair := parse_pair(state.name, state.version):
                known = pairs.entries(state.name).get(pair)
                if known is None or (known.state != READY and state.state == READY):
                    properties[(state.name, pair)] = state.properties
                    pairs.put(state.name, pair, Entry(state.state, state.reason, await self._signature(state, pair)))
        self._remember_gone(pairs)
        self.catalogue, self._properties = pairs, properties

    async def _signature(self, state: ModelState, pair: Pair) -> ModelMetadata | None:
        """The signature of a pair, asked for if it is not known yet or may have changed."""
        known = self.catalogue.entries(state.name).get(pair)
        is_same_release = self.properties(state.name, pair).get(RELEASE_DIGEST) == state.properties.get(RELEASE_DIGEST)
        if known and known.value is not None and known.state == state.state and is_same_release and pair.predictor != UNNAMED:
            return known.value
        if state.state != READY:
            return known.value if known else None
        try:
            return await self._preprocess.metadata(state.name, state.version)
        except (NotFound, Unavailable):  # unloaded since the index was made
            return None

    def _remember_gone(self, pairs: Catalogue[Pair, ModelMetadata]) -> None:
        """Keep pairs that have left the index callable for a while, for requests that name them."""
        now = self._clock()
        self._gone = {key: gone for key, gone in self._gone.items() if gone[0] > now and key not in pairs}
        for model in self.catalogue.models():
            for pair, entry in self.catalogue.entries(model).items():
                if entry.value is not None and (model, pair) not in pairs:
                    self._gone[(model, pair)] = (now + GONE_GRACE_S, entry.value)

    def signature(self, model: str, pair: Pair) -> ModelMetadata | None:
        """The signature of a pair in the index; None if it is not there, or its signature is unknown."""
        entry = self.catalogue.entries(model).get(pair)
        return entry.value if entry else None

    def gone_signature(self, model: str, pair: Pair) -> ModelMetadata | None:
        """The signature of a pair that has left the index a short while ago; None for all others."""
        gone = self._gone.get((model, pair))
        return gone[1] if gone and (model, pair) not in self.catalogue else None

    def properties(self, model: str, pair: Pair) -> Mapping[str, str]:
        """What preprocess says of a pair and its release."""
        return self._properties.get((model, pair), {})

    def sequence(self, model: str, pair: Pair) -> int:
        """The sequence number of a pair's release; 0 if it has none."""
        return release_sequence(self.properties(model, pair))


def release_sequence(properties: Mapping[str, str]) -> int:
    """The sequence number of the release that these properties of a pair name; 0 if they name none."""
    sequence = properties.get(RELEASE_SEQUENCE, "")
    return int(sequence) if sequence.isdecimal() else 0
