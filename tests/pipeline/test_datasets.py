"""Readers of datasets and their download: what is damaged is refused, with the place."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from splitserve.pipeline import Context, StepFailed
from splitserve.pipeline.context import Call
from splitserve.pipeline.templates.images.data import read_files, store
from splitserve.pipeline.templates.images.fetch import fetch
from splitserve.pipeline.templates.images.readers import CIFAR_RECORD, cifar_records, read_cifar, read_fashion_mnist
from splitserve.pipeline.templates.images.transforms import make_transforms

RED = bytes([3]) + bytes([255]) * 1024 + bytes(2048)


def test_planes_are_read_as_red_green_and_blue():
    images = cifar_records(RED + RED, "red.bin", 2)
    assert images.labels.tolist() == [3, 3]
    assert images.pixels.shape == (2, 32, 32, 3)
    assert (images.pixels == [255, 0, 0]).all()


def test_rows_of_a_plane_are_rows_of_the_picture():
    plane = np.arange(1024) % 256
    record = bytes([0]) + plane.astype(np.uint8).tobytes() * 3
    assert (cifar_records(record, "m.bin", 1).pixels[0, :, :, 0] == plane.reshape(32, 32)).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RED + RED[:-1], "expected 2 records of 3073 bytes, 6146 in all, got 6145"),
        ((bytes([0]) + RED) * 2, "got 6148"),
        (RED + bytes([10]) + RED[1:], f"label in 0 to 9 at byte {CIFAR_RECORD}, got 10"),
        (b"", "got 0"),
    ],
    ids=["cut", "two bytes of labels", "label", "empty"],
)
def test_a_damaged_file_of_cifar_is_refused(content: bytes, message: str):
    """CIFAR-100, whose records have two bytes of labels, would shift every image, and still train."""
    with pytest.raises(StepFailed, match=message):
        cifar_records(content, "x.bin", 2)


def _archive(folder: Path, names: Sequence[str], record: bytes = RED[1:]) -> Path:
    """As CIFAR-10 is published: 10,000 records in each file, here of one picture, with the file's place as their label."""
    path = folder / "cifar.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as files:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            content = (bytes([number]) + record) * 10_000
            info.size = len(content)
            files.addfile(info, io.BytesIO(content))
    return path


NAMES = ("test_batch.bin", *(f"data_batch_{number}.bin" for number in (5, 4, 3, 2, 1)))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _archive(tmp_path_factory.mktemp("cifar"), NAMES)


def test_an_archive_is_read_in_the_order_of_its_batches(cifar: Path):
    """Whatever the order of the files in it."""
    train, test = read_cifar(cifar)
    assert train.labels[::10_000].tolist() == [5, 4, 3, 2, 1]
    assert set(test.labels.tolist()) == {0}


def test_an_archive_that_is_damaged_is_refused(cifar: Path, tmp_path: Path):
    """One that lacks a file, is cut short, has records of CIFAR-100, or is none."""
    with pytest.raises(StepFailed, match=r"missing data_batch_1\.bin"):
        read_cifar(_archive(tmp_path, NAMES[:1]))
    with pytest.raises(StepFailed, match=r"data_batch_5\.bin: expected 10000 records of 3073 bytes"):
        read_cifar(_archive(tmp_path, ["data_batch_5.bin"], RED))
    damaged = tmp_path / "damaged.tar.gz"
    for content in (cifar.read_bytes()[:-1000], cifar.read_bytes()[:50], b"<html>not here</html>"):
        damaged.write_bytes(content)
        with pytest.raises(StepFailed, match=f"{damaged}: "):
            read_cifar(damaged)


def test_the_data_step_reads_cifar_from_its_url(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """URL and digest are parameters; the pixels are those of the published transforms, and the files are what clients send."""
    monkeypatch.setattr("splitserve.pipeline.templates.images.data.fetch", partial(fetch, cache=tmp_path / "cache"))
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    digest = hashlib.sha256(cifar.read_bytes()).hexdigest()

    def step(sha256: str) -> None:
        values = {"dataset": "cifar-10", "source": cifar.as_uri(), "sha256": sha256, "n_train": 40, "n_test": 7, "seed": 0}
        store(Context(Call("data", "m", "f", values, {}, [], inputs="", outputs=str(outputs), scratch="", error="")))

    with pytest.raises(StepFailed, match=f"{cifar.as_uri()}: expected SHA-256 00, got {digest}"):
        step("00")
    assert list(outputs.iterdir()) == []

    step(digest)
    with np.load(outputs / "train.npz") as train, np.load(outputs / "test.npz") as test:
        assert set(train["labels"].tolist()) == {1, 2, 3, 4, 5}
        assert test["labels"].tolist() == [0] * 7
        assert train["pixels"].shape == (40, 3, 32, 32)
        assert np.unique(train["pixels"], axis=0).shape[0] == 1
        files = read_files(outputs / "test_files.npz")
        assert (make_transforms().transform(files) == test["pixels"]).all()
    assert (np.asarray(Image.open(io.BytesIO(files[0, 0]))) == [255, 0, 0]).all()
    assert json.loads((outputs / "classes.json").read_text())[:2] == ["airplane", "automobile"]


def test_fashion_mnist_is_padded_and_a_cut_file_is_refused(tmp_path: Path):
    for part, n_images in (("train", 60_000), ("t10k", 10_000)):
        grey = np.full((n_images, 784), 7, np.uint8).tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + grey, 1))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([9]) * n_images, 1))
    train, test = read_fashion_mnist(tmp_path)
    assert (train.pixels.shape, test.pixels.shape) == ((60_000, 32, 32, 3), (10_000, 32, 32, 3))
    assert (test.pixels[0, 1, 1].tolist(), test.pixels[0, 2, 2].tolist(), test.labels[0]) == ([0, 0, 0], [7, 7, 7], 9)

    file = tmp_path / "train-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(bytes(8) + bytes(59_999)))
    with pytest.raises(StepFailed, match="expected 60008 bytes unpacked, got 60007"):
        read_fashion_mnist(tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(StepFailed, match="train-labels"):
        read_fashion_mnist(tmp_path)


@contextmanager
def _server(*answers: tuple[bytes, int]) -> Iterator[tuple[str, list[str]]]:
    """Gives each answer once, the last for ever: bytes, and the length that it announces."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content, length = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/data.tar.gz", asked
        finally:
            server.shutdown()
            thread.join()


GOOD = b"the data" * 100
DIGEST = hashlib.sha256(GOOD).hexdigest()


def test_a_download_is_kept_by_its_digest(tmp_path: Path):
    """A kept file that was damaged is fetched anew."""
    with _server((GOOD, len(GOOD))) as (url, asked):
        kept = fetch(url, DIGEST, tmp_path)
        assert fetch(url, DIGEST, tmp_path) == kept
        assert len(asked) == 1
        kept.write_bytes(b"damaged")
        assert fetch(url, DIGEST, tmp_path).read_bytes() == GOOD


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((GOOD[:640], len(GOOD)), "got 640|IncompleteRead|expected 800 bytes"),
        ((b"other", 5), f"expected SHA-256 {DIGEST}, got {hashlib.sha256(b'other').hexdigest()}"),
        ((b"<html>not here</html>", 21), "expected SHA-256"),
    ],
    ids=["cut short", "other bytes", "a page"],
)
def test_a_bad_download_is_tried_again_once_and_never_kept(tmp_path: Path, answer: tuple[bytes, int], message: str):
    with _server(answer) as (url, asked):
        with pytest.raises(StepFailed, match=message):
            fetch(url, DIGEST, tmp_path)
        assert len(asked) == 2
    assert list(tmp_path.iterdir()) == []
    with _server(answer, (GOOD, len(GOOD))) as (url, _):
        assert fetch(url, DIGEST, tmp_path).read_bytes() == GOOD
