"""The client's examples, run as a user runs them, and its frames against the pipeline."""

from __future__ import annotations

import json
import os
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
DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "client.md").read_text()

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


def blocks_of(page: str, language: str, system: System | None = None) -> list[str]:
    """The blocks of a page in a language; their addresses are those of the system."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    if system is None:
        return blocks
    return [block.replace("127.0.0.1:8000", system.http).replace("127.0.0.1:8001", system.grpc) for block in blocks]


@pytest.mark.parametrize("page", ["client.md", "from-other-clients.md"])
def test_the_guides_snippets_work_in_their_order(system: System, page: str) -> None:
    """They run when pasted one after the other."""
    program = "\n".join(blocks_of(page, "python", system))

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_the_guides_test_of_a_pipeline_is_one(tmp_path: Path) -> None:
    """Ten lines with its imports, run by pytest as a user runs it; it starts a system of its own."""
    [block] = [block for block in blocks_of("client.md", "python") if "def test_my_pipeline" in block]
    (tmp_path / "test_mine.py").write_text(block)

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:schemathesis", "-p", "no:cacheprovider", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(block.split("\n\n\n")[1].splitlines()) < 10


def test_the_guides_commands_work(system: System) -> None:
    """In a shell."""
    commands = blocks_of("client.md", "bash", system)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    printed = [
        subprocess.run(["bash", "-euc", command], env={**os.environ, "PATH": path}, check=True, capture_output=True).stdout
        for command in commands
    ]

    assert [json.loads(text)[0]["label"] for text in printed] == ["Chinstrap"]


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
