"""``--url``: a running system answers; what its refusals do to a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitserve.arrays import from_array
from splitserve.errors import InvalidInput, NotFound, Overloaded, SplitserveError, Unavailable
from splitserve.oip.messages import DEFAULT, RELEASE_DIGEST, RELEASE_SEQUENCE, ModelMetadata
from splitserve.scoring import ScoringError, ServerGone, remote, runs
from splitserve.scoring.remote import PATIENCE_S, RemoteScorer, release_at
from splitserve.tensors import Tensor
from tests.scoring.here import Here
from tests.scoring.releases import release


class NoStages:
    def add(self, stage: str, seconds: float) -> None: ...


class FakeClient:
    """Raises the errors one after the other, each once, then answers; for ever if the last is given so."""

    def __init__(self, *errors: SplitserveError, for_ever: SplitserveError | None = None, digest: str = "a" * 64) -> None:
        self._errors = list(errors)
        self._for_ever = for_ever
        self._digest = digest
        self.asked: list[dict[str, Any]] = []

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None: ...

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        chosen = release()
        properties = {DEFAULT: "1.1", RELEASE_SEQUENCE: "1", RELEASE_DIGEST: self._digest}
        return ModelMetadata(model, ("1.1",), "", chosen.inputs, chosen.outputs, {} if not self._digest else properties)

    def infer(self, model: str, inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        if self._errors:
            raise self._errors.pop(0)
        if self._for_ever:
            raise self._for_ever
        self.asked.append(options)
        return {"sum": inputs["number"] + inputs["count"], "label": inputs["text"].reshape(-1)}


class Time:
    """A clock that pauses move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


def scorer(client: FakeClient, time: Time) -> RemoteScorer:
    return RemoteScorer("host:1", release(), client=client, clock=lambda: time.now, pause=time.pause)  # type: ignore[arg-type]


def rows() -> list[Tensor]:
    return [
        from_array("number", np.array([[1.5], [2.5]])),
        from_array("text", np.array([[b"x"], [b"y"]], dtype=np.object_)),
        from_array("count", np.array([[1], [2]])),
    ]


def test_a_system_that_refuses_is_waited_for() -> None:
    """Longer each time; the version is that of the release."""
    client, time = FakeClient(Overloaded("full"), Unavailable("restarts"), Overloaded("full")), Time()

    answer = scorer(client, time).infer(rows(), NoStages())

    assert [tensor.name for tensor in answer] == ["sum", "label"]
    assert client.asked == [{"version": "1.1", "chunk_rows": None}]
    assert len(time.pauses) == 3
    assert all(low <= pause <= 2 * low for low, pause in zip((0.25, 0.5, 1.0), time.pauses, strict=True))


def test_a_system_that_is_gone_for_good_ends_the_run() -> None:
    """With its own exit status, within the time that is waited."""
    client, time = FakeClient(for_ever=Unavailable("connection refused")), Time()

    with pytest.raises(ServerGone, match=r"host:1: no answer for 300 s: connection refused"):
        scorer(client, time).infer(rows(), NoStages())

    assert PATIENCE_S / 2 < time.now <= PATIENCE_S
    assert ServerGone.exit_status == 4


@pytest.mark.parametrize("error", [InvalidInput("row 0: a number is refused"), NotFound("no such version")])
def test_what_waiting_cannot_change_is_raised_at_once(error: SplitserveError) -> None:
    time = Time()

    with pytest.raises(type(error)):
        scorer(FakeClient(error), time).infer(rows(), NoStages())

    assert time.pauses == []


def test_another_release_under_the_same_pair_is_refused() -> None:
    """The answers of two releases do not mix in one output."""
    with pytest.raises(ScoringError, match="another release serves as 1.1 since the run began"):
        scorer(FakeClient(digest="f" * 64), Time())


def test_the_release_is_that_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_client", lambda url: FakeClient())

    found = release_at("host:1", "m")

    assert (found.name, found.sha256, found.inputs) == ("m/releases/0001-1.1", "a" * 64, release().inputs)
    monkeypatch.setattr(remote, "_client", lambda url: FakeClient(digest=""))
    with pytest.raises(ScoringError, match="its metadata names no release"):
        release_at("host:1", "m")


def test_a_run_asks_the_system_of_its_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chosen: Callable[..., None]) -> None:
    """Every shard's worker, whatever the engine; the answers are those of the release."""
    client = FakeClient()
    monkeypatch.setattr(remote, "_client", lambda url: client)
    (tmp_path / "t.csv").write_text("number,text,count\n1.5,x,1\n2.5,y,2\n")
    options = runs.ScoringOptions(url="host:1")

    summary = runs.run(runs.plan("m", str(tmp_path / "t.csv"), str(tmp_path / "out.csv"), options), options, engine=Here(None))

    assert (summary.rows, summary.scored) == (2, 2)
    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == ['2.5,"x"', '4.5,"y"']
    assert len(client.asked) == 1
