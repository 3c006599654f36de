"""Every message that docs/guide-versions.md quotes, brought about, and compared with what the guide says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler

from splitserve import publish, publish_predictor, publish_preprocessor
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import MODEL_FILE
from tests.command_line import run_command
from tests.system.models import softmax_model

pytestmark = pytest.mark.heavy  # they publish

GUIDE = Path(__file__).parents[2] / "docs" / "guide-versions.md"
ROWS = np.arange(36.0).reshape(9, 4)
COLOURS = pd.DataFrame({"colour": ["red", "green", "blue"] * 3})
WORDS = [0, 1, 1] * 3


def log(rows: Any) -> Any:
    return np.log1p(rows)


def rewrite(repository: Repository, key: BundleKey, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> None:
    """Rewrite a bundle as if composed by hand: manifest and files changed, digests right."""
    from splitserve.repository import manifest as manifests

    bundle = repository.open(key)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    content = json.loads(manifests.encode(bundle.manifest))
    change(content, files)
    repository.remove(key)
    repository.write(manifests.decode(json.dumps(content).encode()), files)


def made_with(**packages: str) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    """The same bundle, had it been published with other versions."""

    def change(content: dict[str, Any], files: dict[str, bytes]) -> None:
        content["environment"].update(
            {name.replace("_", " ").replace("scikit learn", "scikit-learn"): version for name, version in packages.items()}
        )

    return change


def without_plan(content: dict[str, Any], files: dict[str, bytes]) -> None:
    """As published before there were plans."""
    del content["portable"], files["plan.json"], files["plan.npz"]


def other_weights(content: dict[str, Any], files: dict[str, bytes]) -> None:
    """A model that computes something else."""
    model = onnx.load_from_string(files[MODEL_FILE])
    weights = model.graph.initializer[0]
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) * np.float32(1.1), weights.name))
    files[MODEL_FILE] = model.SerializeToString()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of the matrix for a repository with every kind of fault, and of a release that is refused."""
    folder = tmp_path_factory.mktemp("models")
    repository = Repository(folder)

    publish_preprocessor(StandardScaler().fit(ROWS), ROWS, name="iris", repository=folder)
    publish_preprocessor(FunctionTransformer(log), ROWS, name="iris", repository=folder, trusted_modules=[__name__])
    for n_features in (9, 4, 4):
        publish_predictor(softmax_model(n_features), np.ones((4, n_features), np.float32), name="iris", repository=folder)
    rewrite(repository, BundleKey("iris", "predict", 2), other_weights)
    rewrite(repository, BundleKey("iris", "predict", 3), made_with(**{"opset ai.onnx": "40"}))

    one_hot = make_column_transformer((OneHotEncoder(), ["colour"]), verbose_feature_names_out=False)
    publish(make_pipeline(one_hot, LogisticRegression()).fit(COLOURS, WORDS), COLOURS, name="paint", repository=folder)
    rewrite(repository, BundleKey("paint", "preprocess", 1), without_plan)
    rewrite(repository, BundleKey("paint", "preprocess", 1), made_with(**{"scikit-learn": "1.2.0"}))

    ordinal = make_pipeline(OrdinalEncoder(categories=[["red", "green", "blue"]]), LogisticRegression()).fit(COLOURS, WORDS)
    publish(ordinal, COLOURS, name="rents", repository=folder)
    publish_preprocessor(OrdinalEncoder().fit(COLOURS), COLOURS, name="rents", repository=folder)
    (folder / "rents" / "route.json").write_text('{"pairs": [{"pair": "3.1"}]}')
    publish_predictor(softmax_model(4), ROWS.astype(np.float32), name="route", repository=folder)
    (folder / "route" / "route.json").write_text('{"pairs": [')
    publish_preprocessor(StandardScaler().fit(ROWS), ROWS, name="cats", repository=folder)
    publish_predictor(softmax_model(4), ROWS.astype(np.float32), name="cats", repository=folder)
    release = ["release", "cats", "1.1", "--yes"]
    return "".join(run_command(*command, "--repository", folder).output for command in (["matrix"], release))


def plain(line: str) -> str:
    """Without what differs from case to case: numbers, digests, which module, whose route."""
    line = re.sub(r"^\S+: route.json", "MODEL: route.json", line)
    line = re.sub(r"\b[0-9a-f]{12,64}\b", "DIGEST", line.removeprefix("(1) "))
    line = re.sub(r"are not allowed: \S+;", "are not allowed: TYPE;", line)
    return re.sub(r"\d+(\.\d+)*(e-\d+)?", "N", line)


def test_every_message_in_the_guide_is_an_actual_message(told: str) -> None:
    """The tour's are in blocks of text, and tests/system/test_tour.py sees to them."""
    section = GUIDE.read_text().partition("## Messages")[2]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    quoted = [line for language, block in blocks if not language for line in block.splitlines()]
    seen = {plain(re.sub(r"^(\(\d+\)|not deployable:) ", "", line)) for line in told.splitlines()}

    assert len(quoted) >= 7
    assert [line for line in quoted if plain(line) not in seen] == [], told
