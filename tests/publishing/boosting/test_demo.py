"""The demo model of gradient boosting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.publishing.test_publishing import answer
from training.diabetes import diabetes, publish_diabetes

pytestmark = [pytest.mark.boosting, pytest.mark.filterwarnings("ignore")]


def test_the_demo_answers_as_lightgbm_does(tmp_path: Path) -> None:
    """With its column of categories; the served form needs no LightGBM."""
    pipeline, rows = diabetes()

    published = publish_diabetes(str(tmp_path))

    np.testing.assert_allclose(answer(tmp_path, "diabetes", rows)["prediction"].ravel(), pipeline.predict(rows), rtol=1e-6)
    assert published.hard_rows["thresholds"]
