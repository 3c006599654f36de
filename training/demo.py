"""Train and publish the demo models, from data that packages ship: ``python -m training.demo --repository ./models``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from palmerpenguins import load_penguins
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler

from splitserve.publishing import Published, publish
from splitserve.transformers import Flatten

SEED = 0


def penguins() -> tuple[Pipeline, Any]:
    """Species of penguins: mixed columns (344, 7) with missing values, which requests may have too."""
    frame = load_penguins()
    species = frame.pop("species")
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    words = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    columns = make_column_transformer(
        (numbers, make_column_selector(dtype_include="number")),
        (words, make_column_selector(dtype_exclude="number")),
    )
    return make_pipeline(columns, GradientBoostingClassifier(random_state=SEED)).fit(frame, species), frame


def breast_cancer() -> tuple[Pipeline, Any]:
    """Malignant or benign: 30 numbers a row (569, 30)."""
    features, target = load_breast_cancer(return_X_y=True)
    return make_pipeline(StandardScaler(), MLPClassifier((32,), max_iter=500, random_state=SEED)).fit(features, target), features


def digits() -> tuple[Pipeline, Any]:
    """Handwritten digits: images (1797, 8, 8) uint8, 0 to 16."""
    data = load_digits()
    images = data.images.astype("uint8")
    model = make_pipeline(Flatten(), MinMaxScaler(), MLPClassifier((64,), max_iter=1000, random_state=SEED))
    return model.fit(images, data.target), images


DEMOS: dict[str, tuple[Callable[[], tuple[Pipeline, Any]], str]] = {
    "penguins": (penguins, "rows"),
    "breast-cancer": (breast_cancer, "features"),
    "digits": (digits, "image"),
}
"""How each model is trained, and what its input is called if it is one array."""


def publish_demo(name: str, repository: str) -> Published:
    """Train one of the demo models and publish it."""
    train, input_name = DEMOS[name]
    pipeline, rows = train()
    return publish(pipeline, rows, name=name, repository=repository, input_name=input_name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", default="./models", help="folder of the model repository")
    arguments = parser.parse_args()
    for name in DEMOS:
        print(publish_demo(name, arguments.repository), flush=True)


if __name__ == "__main__":
    main()
