"""A running stack for the compose tests, and the models that it serves, with the pipelines that they were made from."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler

from splitserve import publish
from splitserve.transformers import Flatten
from tests.compose.stack import Container, Stack, find_docker, wait_until


class Model(NamedTuple):
    """A fitted pipeline and rows to ask it about."""

    pipeline: Pipeline
    rows: Any


def breast_cancer() -> Model:
    """30 numbers a row."""
    rows, target = load_breast_cancer(return_X_y=True)
    return Model(make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, target), rows)


def digits() -> Model:
    """Pictures, (8, 8) UINT8 a row."""
    data = load_digits()
    rows = data.images.astype(np.uint8)
    return Model(make_pipeline(Flatten(), MinMaxScaler(), LogisticRegression(max_iter=500)).fit(rows, data.target), rows)


def weather() -> Model:
    """A DataFrame of numbers and words, either of which may be missing; the answer is a word."""
    random = np.random.default_rng(0)
    rows = pd.DataFrame(
        {
            "temperature": random.normal(15, 8, 300),
            "humidity": random.uniform(0, 1, 300),
            "wind": random.choice(["north", "south", "none"], 300).astype(object),
        }
    )
    is_wet = rows["humidity"] + 0.2 * (rows["wind"] == "south") > 0.7
    target = np.where(is_wet, np.where(rows["temperature"] < 5, "snow", "rain"), "dry")
    rows.loc[::7, "temperature"] = np.nan
    rows.loc[::11, "wind"] = np.nan
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    words = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    columns = make_column_transformer((numbers, ["temperature", "humidity"]), (words, ["wind"]))
    return Model(make_pipeline(columns, LogisticRegression()).fit(rows, target), rows)


@pytest.fixture(scope="session")
def docker() -> str:
    """The docker client to use."""
    return find_docker()


@pytest.fixture(scope="session")
def repository(docker: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty model repository that the container's user, which is another one, can read."""
    folder = tmp_path_factory.mktemp("compose") / "models"
    folder.mkdir()
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def models(repository: Path) -> dict[str, Model]:
    """The published models."""
    made = {"breast-cancer": breast_cancer(), "digits": digits(), "weather": weather()}
    for name, model in made.items():
        publish(model.pipeline, model.rows, name=name, repository=repository, input_name="rows")
    return made


@pytest.fixture(scope="session")
def project() -> str:
    """A unique project name."""
    return f"splitserve-test-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def stack(docker: str, project: str, repository: Path, models: dict[str, Model]) -> Iterator[Stack]:
    """The services, one container each, every model ready."""
    with started(Stack(docker, project, repository), models) as running:
        yield running


@contextmanager
def started(stack: Stack, models: dict[str, Model], **replicas: int) -> Iterator[Stack]:
    """Built and up, every model ready; nothing of it is left afterwards."""
    try:
        stack.build()
        stack.up(**replicas)
        wait_until_ready(stack, models)
        yield stack
    finally:
        stack.down()


def wait_until_ready(stack: Stack, models: dict[str, Model]) -> None:
    """`Stack.up` is content with one model that is ready; this waits for all."""
    for name in models:
        wait_until(lambda name=name: httpx.get(f"{stack.http}/v2/models/{name}/ready").is_success, f"model {name} ready")


def probe(container: Container, arguments: list[str]) -> bool:
    """Whether a service's own health check is content; with ``--ready``, whether it can be served from."""
    return container.try_python("-m", "splitserve.server.probe", *arguments).returncode == 0
