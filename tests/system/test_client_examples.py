"""The client's examples, run as a user runs them, and its frames against the pipeline."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from splitserve import Client
from tests.demo_models import Demos
from tests.system.processes import System

EXAMPLES = Path(__file__).parents[2] / "examples" / "client"
GUIDE = (Path(__file__).parents[2] / "docs" / "client.md").read_text()

PRINTS = {
    "arrays": "a one is read as 1",
    "asynchronous": "20 answers, the first:",
    "errors_and_health": "too late:",
    "frames": "answered by pair 1.1",
    "large_frame": "Adelie",
}


@pytest.fixture(params=["grpc", "rest"])
def url(request: pytest.FixtureRequest, system: System) -> str:
    return system.grpc if request.param == "grpc" else f"http://{system.http}"


def test_every_example_is_tested_and_named_in_the_guide() -> None:
    """Every file in the folder."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}

    assert names == set(PRINTS)
    assert all(f"examples/client/{name}.py" in GUIDE for name in names)


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_works_over_both_transports(url: str, name: str) -> None:
    """Exit status 0, nothing on stderr, the expected output."""
    command = [sys.executable, EXAMPLES / f"{name}.py", url]

    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert PRINTS[name] in done.stdout


def test_the_guides_snippets_work_in_their_order(system: System) -> None:
    """They run when pasted one after the other."""
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)
    program = "\n".join(blocks).replace("127.0.0.1:8000", system.http).replace("127.0.0.1:8001", system.grpc)

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("dtype", ["object", "string", "category", "str"])
def test_a_mixed_frame_gives_the_answer_of_the_pipeline(url: str, demos: Demos, dtype: str) -> None:
    """Every text dtype of pandas, with missing numbers and text, in chunks or whole."""
    demo = demos.models["penguins"]
    frame = demo.rows.astype(dict.fromkeys(("island", "sex"), dtype)).astype({"year": "Int64"}).rename(index=lambda i: f"p{i}")

    with Client(url) as client:
        whole = client.infer("penguins", frame, chunk_rows=0).to_frame()
        chunked = client.infer("penguins", frame, chunk_rows=100).to_frame()

    assert whole["label"].tolist() == demo.pipeline.predict(demo.rows).tolist()
    np.testing.assert_allclose(whole.iloc[:, -3:], demo.pipeline.predict_proba(demo.rows), atol=1e-4)
    pd.testing.assert_frame_equal(whole, chunked)
    assert whole.index.equals(frame.index)
