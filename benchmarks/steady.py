"""Steady load by the Python client, every answer compared: requests are sent on a schedule, whatever the outcome of earlier ones.

Used by the fault tests and by the soak. Answers are compared with those of the pipeline itself, in this process.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from splitserve import TLS, AsyncClient
from splitserve.errors import SplitserveError

PER_S = 40.0
TIMEOUT_S = 10.0
MOST_ROWS = 5
TOLERANCE = 1e-4


class Reference:
    """Rows to send, and the answers of the published pipeline to them.

    Args:
        pipeline: fitted, with ``predict`` and ``predict_proba``.
        rows: an array or a DataFrame.
    """

    def __init__(self, pipeline: Any, rows: Any) -> None:
        self.rows = rows
        self._labels = [str(label) for label in pipeline.predict(rows)]
        self._probabilities = np.asarray(pipeline.predict_proba(rows))

    def difference(self, first: int, end: int, answer: Mapping[str, Any]) -> str:
        """Where an answer to ``rows[first:end]`` is not the pipeline's; empty if it is."""
        labels = [label.decode() if isinstance(label, bytes) else str(label) for label in answer["label"].ravel().tolist()]
        if labels != self._labels[first:end]:
            return f"rows {first}:{end}: expected the labels {self._labels[first:end]}, got {labels}"
        worst = float(np.abs(answer["probabilities"] - self._probabilities[first:end]).max())
        return "" if worst <= TOLERANCE else f"rows {first}:{end}: a probability is off by {worst}"


class RequestOutcome(msgspec.Struct, frozen=True):
    """The outcome of one request. ``began`` is on the monotonic clock; without ``failure`` and ``difference`` it is right."""

    url: str
    model: str
    began: float
    seconds: float
    failure: str = ""
    difference: str = ""


class SteadyLoad:
    """Load while entered, from a thread of its own.

    Args:
        urls: of the proxies, used in turn, with a client each.
        references: by the model's name.
        per_s: requests a second.
        timeout_s: deadline of each, retries included.
        tls: certificates for the URLs that require them.
    """

    def __init__(
        self,
        urls: Sequence[str],
        references: Mapping[str, Reference],
        *,
        per_s: float = PER_S,
        timeout_s: float = TIMEOUT_S,
        tls: TLS | None = None,
        seed: int = 0,
    ) -> None:
        self._urls = urls
        self._references = references
        self._per_s = per_s
        self._timeout_s = timeout_s
        self._tls = tls
        self._random = random.Random(seed)  # noqa: S311
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._changed = threading.Condition()
        self.outcomes: list[RequestOutcome] = []

    def __enter__(self) -> SteadyLoad:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Send no more requests, and wait for those in flight."""
        self._is_over.set()
        self._thread.join()

    @property
    def failures(self) -> list[RequestOutcome]:
        """Requests that were not answered."""
        return [outcome for outcome in list(self.outcomes) if outcome.failure]

    @property
    def wrong(self) -> list[RequestOutcome]:
        """Answers that are not the pipeline's."""
        return [outcome for outcome in list(self.outcomes) if outcome.difference]

    def kinds(self) -> Counter[str]:
        """How often each failure was seen."""
        return Counter(outcome.failure for outcome in self.failures)

    def wait_for(self, n_answers: int, patience_s: float = 60.0) -> None:
        """Wait until so many more were answered.

        Raises:
            AssertionError: they were not, within ``patience_s``.
        """
        goal = self._n_answered() + n_answers
        with self._changed:
            if not self._changed.wait_for(lambda: self._n_answered() >= goal, patience_s):
                raise AssertionError(f"not {n_answers} more answers in {patience_s} s; failures: {dict(self.kinds())}")

    def _n_answered(self) -> int:
        return sum(not outcome.failure for outcome in list(self.outcomes))

    async def _run(self) -> None:
        clients = {
            url: AsyncClient(url, timeout_s=self._timeout_s, tls=self._tls if url.startswith(("https:", "grpcs:")) else None)
            for url in self._urls
        }
        under_way: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        turn = 0
        while not self._is_over.is_set():
            url = self._urls[turn % len(self._urls)]
            task = asyncio.create_task(self._ask(url, clients[url]))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            turn += 1
            due += 1 / self._per_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(*under_way)
        for client in clients.values():
            await client.close()

    async def _ask(self, url: str, client: AsyncClient) -> None:
        model = self._random.choice(list(self._references))
        reference = self._references[model]
        first = self._random.randrange(len(reference.rows) - MOST_ROWS)
        end = first + self._random.randint(1, MOST_ROWS)
        failure = difference = ""
        began = time.monotonic()
        try:
            difference = reference.difference(first, end, await client.infer(model, reference.rows[first:end]))
        except SplitserveError as error:
            failure = f"{type(error).__name__}: {error}"
        except Exception as error:  # the client promises its own errors only
            failure = repr(error)
        with self._changed:
            self.outcomes.append(RequestOutcome(url, model, began, time.monotonic() - began, failure, difference))
            self._changed.notify_all()
