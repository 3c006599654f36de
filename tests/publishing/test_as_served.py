"""What would be dead when served is refused at publish: it is loaded in a process that knows what a service knows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitserve import PublishError
from splitserve.arrays import from_array, to_array
from splitserve.publishing import as_served
from splitserve.publishing.convert import Names, to_onnx
from splitserve.publishing.halves import PredictorHalf, PreprocessorHalf, PublishOptions
from splitserve.publishing.predictor_half import ModelSamples, predictor_half
from splitserve.publishing.preprocessor_half import FeatureForm, preprocessor_half
from splitserve.runtimes.rows import to_tensors
from tests.publishing import pipelines

HEADER = """
import json
import sys
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from splitserve import PublishError, publish

rows = np.random.default_rng(0).normal(size=(40, 3))
target = np.arange(40) % 2

def published(case, *steps, **options):
    try:
        pipeline = make_pipeline(*steps, LogisticRegression()).fit(rows, target)
        found = str(publish(pipeline, rows, name="m", repository=f"{sys.argv[1]}/{case}", **options))
    except PublishError as error:
        found = f"refused: {error}"
    print(json.dumps([case, found]))
"""

SCRIPT = """
def doubled(x):
    return 2 * x

published("a function of a script", FunctionTransformer(doubled), trusted_modules=["__main__"])
published("a pickle with a function of a script", FunctionTransformer(lambda x: 2 * x), allow_pickle=True)

from sklearn.preprocessing import StandardScaler

class Own(StandardScaler):
    def __reduce__(self):
        return (Own, (), self.__dict__)

published("a pickle with a class of a script", Own(), allow_pickle=True)

from sklearn.experimental import enable_iterative_imputer
from sklearn.impute import IterativeImputer

published("an experimental transformer", IterativeImputer())

import pandas as pd
from sklearn import set_config
from sklearn.compose import make_column_transformer

set_config(transform_output="pandas")
rows = pd.DataFrame(rows, columns=["a", "b", "c"])
published("a setting of scikit-learn", StandardScaler(), make_column_transformer((FunctionTransformer(), ["a"])))
"""
"""What the script publishes; each is loaded in a process of its own."""

CASES = {
    "a function of a script": "^refused: a service could not serve this: .*functions and classes of a notebook or script",
    "a pickle with a function of a script": "^refused: .*pickle",
    "a pickle with a class of a script": "^refused: .*(__main__|Own)",
    "an experimental transformer": "^m 1.1, release 1",
    "a setting of scikit-learn": r"^refused: .*in this process alone: keep it in the pipeline, with pipeline.set_output\(",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The repositories of the script, and what came of each case."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "script.py").write_text(HEADER + SCRIPT)
    command = [sys.executable, folder / "script.py", folder / "models"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return folder / "models", dict(map(json.loads, answer.stdout.splitlines()))


@pytest.mark.parametrize("case", CASES)
def test_what_exists_in_the_publishers_process_only_is_refused(ran: tuple[Path, dict[str, str]], case: str) -> None:
    """As in a notebook. What scikit-learn hides behind an import is served all the same."""
    models, outcomes = ran

    assert re.search(CASES[case], outcomes[case], re.DOTALL), outcomes
    assert ("refused" in outcomes[case]) is (not list((models / case).rglob("manifest.json")))


def a_half() -> PreprocessorHalf:
    pipeline, rows = pipelines.CASES["logistic regression"].fitted()
    features = FeatureForm(name="y", precision="FP32", all_as_floats=True)
    return preprocessor_half(pipeline[:-1], rows, features, PublishOptions(name="m", input_name="x"))


def test_the_fresh_process_is_kept_and_starts_again() -> None:
    """One import of scikit-learn serves all publications of a process; a process that died is replaced."""
    half = a_half()

    as_served.check(half)
    first = as_served._process()
    as_served.check(half)
    assert as_served._process() is first

    first.close()
    as_served.check(half)
    assert as_served._process() is not first


LATE = """
import os
from splitserve.publishing import as_served

reached, reaches = os.pipe()
wait = os.waitpid

def waitpid(*arguments):
    os.write(reaches, b"x")
    return wait(*arguments)

def answer(line, out):
    os.write(out, line)
    os.read(reached, 1)

os.waitpid, as_served._answer = waitpid, answer
as_served.serve()
"""
"""Echoes requests; what has answered one ends only when its end is waited for."""


def test_a_request_that_comes_before_the_last_one_has_ended_is_answered() -> None:
    """Each answer is that of its own request."""
    command = [sys.executable, "-c", LATE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        answers = []
        for request in ("first\n", "second\n", "third\n"):
            server.stdin.write(request)
            answers.append(server.stdout.readline())
        server.stdin.close()
        rest = server.stdout.read()

    assert answers == ["first\n", "second\n", "third\n"]
    assert rest == ""
    assert server.returncode == 0


def test_a_damaged_file_is_refused() -> None:
    """With the words of the loader."""
    half = a_half()
    half.files["plan.npz"] = b"no archive"

    with pytest.raises(PublishError, match=r"a service could not serve this: .*plan.npz: not an npz file"):
        as_served.check(half)


def test_another_answer_than_the_publishers_is_refused() -> None:
    """Such as that of a library which the publisher has changed."""
    case = pipelines.CASES["logistic regression"]
    pipeline, rows = case.fitted()
    half = a_half()
    sample = to_array(half.golden.outputs[0])
    model = to_onnx(pipeline[-1], 5, input_name="y", precision="FP32").SerializeToString()
    predictor = predictor_half(model, ModelSamples({"y": sample}), PublishOptions(name="m"), names=Names(labels=("0", "1")))

    class Changed:
        inputs, outputs = predictor.runtime.inputs, predictor.runtime.outputs

        def infer(self, inputs: Any) -> Any:
            return [
                from_array(tensor.name, to_array(tensor)[::-1], tensor.datatype) for tensor in predictor.runtime.infer(inputs)
            ]

    changed = PredictorHalf(predictor.manifest, predictor.files, Changed(), predictor.golden)
    raw = to_tensors(half.rows, half.manifest.inputs, rows[:20])

    as_served.check(half, predictor, inputs=raw)
    with pytest.raises(PublishError, match="in a fresh process, output"):
        as_served.check(half, changed, inputs=raw)
