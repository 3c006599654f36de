"""Inputs that a model ignores, sent to preprocess directly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from splitserve import publish
from splitserve.arrays import from_array, to_array
from splitserve.errors import InvalidInput
from splitserve.oip.messages import InferRequest
from tests.preprocess.test_releases import Services


async def test_they_are_removed_before_the_request_is_checked(tmp_path: Path) -> None:
    """Their number of rows is not the request's. The metadata lists them; other names are refused."""
    X = pd.DataFrame({"x": np.arange(20.0), "id": "a"})
    pipeline = make_pipeline(make_column_transformer((StandardScaler(), ["x"])), Ridge()).fit(X, X["x"] * 2)
    publish(pipeline, X, name="m", repository=tmp_path)
    used, ignored, unknown = (from_array(name, np.ones((n, 1))) for name, n in (("x", 2), ("id", 5), ("other", 2)))

    with ThreadPoolExecutor(1) as executor:
        service = await Services(tmp_path, executor).refresh()
        response = await service.infer(InferRequest("m", (ignored, used)))
        with pytest.raises(InvalidInput, match='unknown input "other", expected "x"'):
            await service.infer(InferRequest("m", (ignored, used, unknown)))
        metadata = await service.metadata("m")
        await service.close()

    np.testing.assert_allclose(
        to_array(response.outputs[0]).ravel(), pipeline.predict(pd.DataFrame({"x": [1.0, 1.0]})), rtol=1e-5
    )
    assert metadata.properties["ignored_inputs"] == '["id"]'
