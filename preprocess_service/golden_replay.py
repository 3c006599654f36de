"""Golden samples of releases, run through the whole chain before a pair serves: transform, the real predict, postprocess.

A release is proven once for each predictor that it runs with. The calls to predict are not counted and do not compete with
requests. A call that fails because predict is not available is tried again; only an answer that differs refuses a release.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import structlog

from splitserve.batching.merging import split
from splitserve.errors import DeadlineExceeded, NotFound, Overloaded, SplitserveError, Unavailable
from splitserve.oip.messages import (
    EXPECTED_MANIFEST,
    GOLDEN_REPLAY,
    InferenceService,
    InferRequest,
    InferResponse,
    Parameter,
    deadline_after,
)
from splitserve.repository.golden import Golden, error_ratio
from splitserve.repository.manifest import BundleError, NotFetched
from splitserve.repository.release import Release
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.runtimes.release import check_answer, golden_of
from splitserve.server.compute import Compute
from splitserve.server.store import VersionStore
from splitserve.signature import TensorSpec, check_outputs, is_row_wise
from splitserve.tensors import Tensor
from splitserve.versions import UNNAMED

REPLAY_TIMEOUT_S = 60.0
"""Most time that one call to predict with golden rows may take."""

REPEAT_S = 600.0
"""How often a release with a third-party predict server is proven again: such a server does not report changes of its model."""

AT_A_TIME = 2

IN_PROGRESS = "loading: its golden samples are being replayed"


class PairUnderProof(msgspec.Struct, frozen=True):
    """A release with the halves that it is run with. ``predictor_sha256`` is "" if predict reports no digest."""

    release: Release
    preprocessor: Preprocessor
    predictor_outputs: tuple[TensorSpec, ...]
    predictor_sha256: str

    @property
    def key(self) -> tuple[str, str]:
        """What a replay is valid for: the release with this predictor."""
        return self.release.sha256, self.predictor_sha256


class _ReplayState(msgspec.Struct):
    """The replay of a pair: ``problem`` is None until the first one has finished, "" if its answers agreed. ``error`` is the
    largest difference relative to its tolerance, NaN before the first answer.
    """

    problem: str | None = None
    place: tuple[str, str] = ("", "")
    error: float = math.nan
    proven_at: float = -math.inf
    task: asyncio.Task[None] | None = None
    waiting: str = IN_PROGRESS


class GoldenReplay:
    """Proves releases in the background and remembers the outcome.

    Args:
        preprocessors: has the golden samples.
        predict: the next service.
        compute: where transforms run.
        max_message_bytes: the largest message to predict; golden rows are sent in chunks below half of it.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        preprocessors: VersionStore[Preprocessor],
        predict: InferenceService,
        compute: Compute,
        *,
        max_message_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._preprocessors = preprocessors
        self._predict = predict
        self._compute = compute
        self._max_chunk_bytes = max_message_bytes // 2
        self._clock = clock
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._proofs: dict[tuple[str, str], _ReplayState] = {}
        self._log = structlog.get_logger()

    def problem(self, pair: PairUnderProof) -> str | None:
        """Why a pair is refused, "" if its release is proven, None while that is not known. Starts the replay if it is due."""
        proof = self._proofs.setdefault(pair.key, _ReplayState(place=(pair.release.key.model, str(pair.release.pair))))
        is_due = not pair.predictor_sha256 and self._clock() - proof.proven_at >= REPEAT_S
        if (proof.problem is None or is_due) and (proof.task is None or proof.task.done()):
            proof.task = asyncio.create_task(self._prove(pair, proof))
        return proof.problem

    def errors(self) -> dict[tuple[str, str], float]:
        """By model and pair: the largest difference from the recorded answers relative to its tolerance, at the last replay."""
        return {proof.place: proof.error for proof in self._proofs.values() if not math.isnan(proof.error)}

    def waiting_for(self, pair: PairUnderProof) -> str:
        """What a replay in progress waits for."""
        return self._proofs[pair.key].waiting

    def keep(self, keys: set[tuple[str, str]]) -> None:
        """Forget all other replays."""
        for key in self._proofs.keys() - keys:
            proof = self._proofs.pop(key)
            if proof.task is not None:
                proof.task.cancel()

    def expire(self) -> None:
        """Replay again where predict reports no digest: since the connection was lost it may be another server."""
        for (_, predictor_sha256), proof in self._proofs.items():
            if not predictor_sha256:
                proof.proven_at = -math.inf

    async def settle(self, timeout_s: float) -> None:
        """Wait for replays in progress.

        Args:
            timeout_s: seconds to wait at most.
        """
        if tasks := [proof.task for proof in self._proofs.values() if proof.task is not None and not proof.task.done()]:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def close(self) -> None:
        """Cancel what is in progress."""
        tasks = [proof.task for proof in self._proofs.values() if proof.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _prove(self, pair: PairUnderProof, proof: _ReplayState) -> None:
        release = pair.release
        try:
            async with self._turns:
                problem = await self._difference(pair, proof)
        except (
            Unavailable,
            NotFound,
            Overloaded,
            DeadlineExceeded,
        ) as error:  # predict is busy, restarts, or has not loaded it yet
            proof.waiting = f"{IN_PROGRESS}: {error.message}"
            return
        except NotFetched as error:
            proof.waiting = f"its golden samples cannot be fetched: {error}"
            return
        except SplitserveError as error:
            problem = error.message
        except BundleError as error:
            problem = str(error)
        except Exception:
            # An unexpected error, with its traceback.
            self._log.exception("golden replay failed", release=str(release.key))
            problem = "golden samples cannot be replayed; the log has the cause"
        proof.proven_at = self._clock()
        proof.waiting = IN_PROGRESS
        proof.problem = f"{release.key}: {problem}" if problem else ""
        if not problem:
            # The whole chain has given the recorded answers.
            self._log.info("release proven", release=str(release.key))

    async def _difference(self, pair: PairUnderProof, proof: _ReplayState) -> str:
        """How the answers differ from the recorded ones; "" if they agree.

        Raises:
            NotFetched: the samples cannot be read now.
            BundleError: they are not those of the release.
            SplitserveError: a stage refuses them, or is not available.
        """
        manifest = pair.release.manifest
        golden = golden_of(manifest, await self._preprocessors.read_golden(pair.release))
        answers = [await self._answer(pair, chunk) for chunk in self._chunks(pair, golden)]
        answer = _joined(answers)
        proof.error = error_ratio(golden.outputs, answer, manifest.tolerances)
        check_answer(manifest, golden, answer)
        return ""

    def _chunks(self, pair: PairUnderProof, golden: Golden) -> list[tuple[Tensor, ...]]:
        """Golden rows in chunks below the limit; all together where answers depend on the other rows."""
        n_rows = golden.inputs[0].n_rows if golden.inputs else 0
        manifest = pair.release.manifest
        if n_rows < 2 or not manifest.is_row_wise or not is_row_wise(manifest.inputs, manifest.outputs):
            return [golden.inputs]
        n_bytes = max(
            sum(len(tensor.raw) for tensor in golden.inputs),
            sum(len(tensor.raw) for tensor in golden.outputs),
            pair.preprocessor.output_bytes.at_least(n_rows, golden.inputs),
        )
        n_chunks = min(n_rows, math.ceil(n_bytes / self._max_chunk_bytes) or 1)
        bounds = [round(index * n_rows / n_chunks) for index in range(n_chunks + 1)]
        return split(InferResponse(manifest.model, "", golden.inputs), [end - start for start, end in pairwise(bounds)])

    async def _answer(self, pair: PairUnderProof, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The answer of the whole chain to some rows."""
        preprocessor, key = pair.preprocessor, pair.release.key
        n_rows = rows[0].n_rows
        features = await self._compute.run(preprocessor, n_rows, preprocessor.transform, rows)
        parameters: dict[str, Parameter] = {}
        if pair.predictor_sha256:
            parameters = {EXPECTED_MANIFEST: pair.predictor_sha256, GOLDEN_REPLAY: True}
        version = "" if key.pair.predictor == UNNAMED else str(key.pair.predictor)
        response = await self._predict.infer(
            InferRequest(
                key.model,
                preprocessor.sent(features),
                version=version,
                parameters=parameters,
                deadline=deadline_after(REPLAY_TIMEOUT_S),
            )
        )
        check_outputs(pair.predictor_outputs, response.outputs, features[0].n_rows)
        return preprocessor.answer(response.outputs)


def _joined(answers: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The rows of several answers in one."""
    if len(answers) == 1:
        return tuple(answers[0])
    joined = []
    for parts in zip(*answers, strict=True):
        n_rows = sum(part.n_rows for part in parts)
        raw = b"".join(bytes(part.raw) for part in parts)
        joined.append(msgspec.structs.replace(parts[0], shape=(n_rows, *parts[0].shape[1:]), raw=raw))
    return tuple(joined)
