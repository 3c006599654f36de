"""After any change to published files, the pair serves no answer after the next load."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.errors import NotFound, Unavailable
from tests.preprocess.test_releases import Services, publish_model, request


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and another fit of it: every half fits every other."""
    from sklearn.preprocessing import MinMaxScaler

    root = tmp_path_factory.mktemp("edits")
    publish_model(root / "models")
    publish_model(root / "others", MinMaxScaler())
    return root


FILES = [
    "preprocess/1/manifest.json",
    "preprocess/1/pipeline.skops",
    "preprocess/1/plan.json",
    "preprocess/1/plan.npz",
    "preprocess/1/golden.npz",
    "predict/1/manifest.json",
    "predict/1/model.onnx",
    "predict/1/golden.npz",
    "releases/0001-1.1/manifest.json",
    "releases/0001-1.1/golden.npz",
]


async def serves(root: Path) -> bool:
    """Whether services that start now answer with the pair."""
    with ThreadPoolExecutor(1) as executor:
        service = await Services(root, executor).refresh()
        try:
            await service.infer(request("1.1"))
        except (NotFound, Unavailable):
            return False
        finally:
            await service.close()
        return True


async def test_what_was_not_changed_serves(published: Path) -> None:
    """The control: without a change the pair serves."""
    assert await serves(published / "models")


@settings(max_examples=24, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
async def test_a_byte_that_is_changed_serves_no_answer(published: Path, tmp_path: Path, file: str, at: float, by: int) -> None:
    """In any file of either bundle or of the release."""
    root = tmp_path / "models"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(published / "models", root)
    path = root / "m" / file
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= by
    path.write_bytes(data)

    assert not await serves(root)


@pytest.mark.parametrize("part", ["preprocess/1", "predict/1", "releases/0001-1.1"])
async def test_a_part_of_another_publish_serves_no_answer(published: Path, tmp_path: Path, part: str) -> None:
    """Each part is valid and fits."""
    root = tmp_path / "models"
    shutil.copytree(published / "models", root)
    shutil.rmtree(root / "m" / part)
    shutil.copytree(published / "others" / "m" / part, root / "m" / part)

    assert not await serves(root)


async def test_a_copy_by_file_serves(published: Path, tmp_path: Path) -> None:
    """With other times, owners and modes than the original."""
    root = tmp_path / "models"
    for path in (published / "models").rglob("*"):
        target = root / path.relative_to(published / "models")
        if path.is_dir():
            target.mkdir(parents=True)
        else:
            target.write_bytes(path.read_bytes())

    assert await serves(root)
