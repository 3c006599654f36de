"""A run without a repository: the release and what answers are fakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitserve.scoring import runs
from splitserve.scoring.release import ScoringRelease
from splitserve.scoring.runs import ScoringOptions
from splitserve.scoring.summary import Summary
from tests.scoring.here import Here
from tests.scoring.releases import Adding, release

Scored = Callable[..., Summary]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[[ScoringRelease], None]:
    """Sets the release that is chosen, whatever model is named."""

    def set_release(found: ScoringRelease) -> None:
        monkeypatch.setattr(runs, "choose", lambda *_, **__: found)

    set_release(release())
    return set_release


@pytest.fixture
def scored(chosen: object) -> Scored:
    """Scores a path in this process by `Adding`."""

    def score(where: Path | str, output: Path | str, *, engine: Any = None, **options: Any) -> Summary:
        chosen_options = ScoringOptions(**options)
        planned = runs.plan("m", str(where), str(output), chosen_options)
        return runs.run(planned, chosen_options, engine=engine or Here(Adding()))

    return score
