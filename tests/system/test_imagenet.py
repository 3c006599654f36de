"""The picture model, with its real weights: exported by torch, served without it."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from splitserve import Client
from splitserve.errors import InvalidInput
from tests.system.processes import System

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.imagenet, pytest.mark.xdist_group("imagenet")]


def encoded(name: str, form: str) -> bytes:
    """One of scikit-image's pictures as a file."""
    file = io.BytesIO()
    Image.fromarray(getattr(skimage.data, name)()).save(file, form, quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    repository = tmp_path_factory.mktemp("imagenet")
    subprocess.run([sys.executable, "-m", "training.imagenet", "--repository", repository], cwd=ROOT, check=True)
    running = System(repository).wait_until_settled()
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("picture", "form", "label"),
    [("chelsea", "JPEG", "Egyptian cat"), ("chelsea", "PNG", "Egyptian cat"), ("coffee", "JPEG", "espresso")],
)
def test_a_picture_is_recognised(system: System, picture: str, form: str, label: str) -> None:
    """A JPEG or PNG file is one BYTES element; softmax and label are the preprocessor's postprocess step."""
    file = encoded(picture, form)

    status, over_rest = system.rest("/v1/models/imagenet:predict", {"instances": [{"b64": base64.b64encode(file).decode()}]})
    with Client(system.grpc) as client:
        over_grpc = client.infer("imagenet", {"image": np.array([[file]], dtype=object)})

    assert (status, over_rest["predictions"][0]["label"]) == (200, label)
    assert over_grpc["label"].tolist() == [label]
    assert over_grpc["probabilities"].shape == (1, 1000)
    np.testing.assert_allclose(over_grpc["probabilities"].sum(), 1, atol=1e-5)


def test_the_command_takes_a_picture(system: System, tmp_path: Path) -> None:
    """``splitserve infer`` sends the file and prints the label."""
    (tmp_path / "cat.jpg").write_bytes(encoded("chelsea", "JPEG"))
    command = Path(sys.executable).with_name("splitserve")

    printed = subprocess.run(
        [command, "infer", "imagenet", tmp_path / "cat.jpg", "--url", system.grpc], check=True, capture_output=True, text=True
    ).stdout

    assert "Egyptian cat" in printed


def test_bytes_that_are_not_an_image_are_invalid_input(system: System) -> None:
    """The row is named; the service lives on."""
    with Client(system.grpc) as client:
        with pytest.raises(InvalidInput, match="image 1 is not a JPEG or PNG file"):
            client.infer("imagenet", {"image": np.array([[encoded("chelsea", "JPEG")], [b"no picture"]], dtype=object)})
        answer = client.infer("imagenet", {"image": np.array([[encoded("chelsea", "JPEG")]], dtype=object)})

    assert answer["label"].tolist() == ["Egyptian cat"]
