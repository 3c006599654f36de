"""What would be dead when served is refused at publish: it is loaded in a process that knows what a service knows."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
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
import sys
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from splitserve import PublishError, publish

rows = np.random.default_rng(0).normal(size=(40, 3))
target = np.arange(40) % 2

def published(*steps, **options):
    try:
        pipeline = make_pipeline(*steps, LogisticRegression()).fit(rows, target)
        print(publish(pipeline, rows, name="m", repository=sys.argv[1], **options))
    except PublishError as error:
        print("refused:", error)
"""

SCRIPTS = {
    "a function of a script": (
        "def doubled(x):\n    return 2 * x\n\npublished(FunctionTransformer(doubled), trusted_modules=['__main__'])",
        "refused: a service could not serve this: .*functions and classes of a notebook or script",
    ),
    "a pickle with a function of a script": (
        "published(FunctionTransformer(lambda x: 2 * x), allow_pickle=True)",
        "refused: .*pickle",
    ),
    "a pickle with a class of a script": (
        """
        from sklearn.preprocessing import StandardScaler

        class Own(StandardScaler):
            def __reduce__(self):
                return (Own, (), self.__dict__)

        published(Own(), allow_pickle=True)
        """,
        "refused: .*(__main__|Own)",
    ),
    "an experimental transformer": (
        """
        from sklearn.experimental import enable_iterative_imputer
        from sklearn.impute import IterativeImputer

        published(IterativeImputer())
        """,
        "^m 1.1, release 1",
    ),
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_what_exists_in_the_publishers_process_only_is_refused(tmp_path: Path, case: str) -> None:
    """As in a notebook. What scikit-learn hides behind an import is served all the same."""
    body, message = SCRIPTS[case]
    script = tmp_path / "script.py"
    script.write_text(HEADER + textwrap.dedent(body))

    ran = subprocess.run([sys.executable, script, tmp_path / "models"], capture_output=True, text=True, check=False, timeout=120)

    assert ran.returncode == 0, ran.stderr
    assert re.search(message, ran.stdout), ran.stdout
    assert ("refused" in ran.stdout) is (not list((tmp_path / "models").rglob("manifest.json")))


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


def test_a_damaged_file_is_refused() -> None:
    """With the words of the loader."""
    half = a_half()
    half.files["pipeline.skops"] = b"no archive"

    with pytest.raises(PublishError, match=r"a service could not serve this: .*not a skops file"):
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
