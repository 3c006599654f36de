"""Train and publish the demo model of gradient boosting: ``make diabetes``, or ``python -m training.diabetes`` with LightGBM."""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd
from lightgbm import LGBMRegressor
from sklearn.datasets import load_diabetes
from sklearn.pipeline import Pipeline, make_pipeline

from splitserve.publishing import Published, publish

SEED = 0


def diabetes() -> tuple[Pipeline, Any]:
    """Progression of diabetes: nine numbers and a column of two categories a row (442, 10), into LightGBM as they are."""
    features, target = load_diabetes(return_X_y=True, as_frame=True, scaled=False)
    rows = features.assign(sex=pd.Categorical(features["sex"].map({1.0: "one", 2.0: "two"})))
    return make_pipeline(LGBMRegressor(n_estimators=60, num_leaves=8, random_state=SEED, verbose=-1)).fit(rows, target), rows


def publish_diabetes(repository: str) -> Published:
    pipeline, rows = diabetes()
    return publish(pipeline, rows, name="diabetes", repository=repository)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", default="./models", help="folder of the model repository")
    print(publish_diabetes(parser.parse_args().repository), flush=True)


if __name__ == "__main__":
    main()
