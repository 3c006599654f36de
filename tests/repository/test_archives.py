"""Archives in bundles: a small file does not fill the memory by being read."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from splitserve.arrays import from_array
from splitserve.repository import archives
from splitserve.repository.archives import check_npz, check_skops
from splitserve.repository.golden import Golden, decode, encode
from splitserve.repository.manifest import BundleError
from splitserve.runtimes.sklearn_pipeline import dump, load
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor

LIMIT = 4 * 1024**2
NUMBERS = np.array([[1.0, 2.0], [3.0, 4.0]])


def a_zip(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def header(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    """What is in front of an array's bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.fixture
def bomb(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small npz that unpacks to more than the limit, which is lower here so that making it is quick: zeros."""
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", LIMIT)
    n_rows = LIMIT // 8
    data = a_zip(("inputs/x.npy", header((n_rows,)) + bytes(n_rows * 8)), compression=zipfile.ZIP_DEFLATED)
    assert len(data) < LIMIT / 500
    return data


def test_golden_samples_that_decompress_to_gigabytes_are_refused(bomb: bytes) -> None:
    """The archive's directory says how much it would be."""
    with pytest.raises(BundleError, match=rf"^golden\.npz: has \d+ bytes unpacked; the limit is {LIMIT}$"):
        decode(bomb, [TensorSpec("x", "FP64", ("batch",))], [])


def test_golden_samples_beyond_the_read_limit_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limit, when publishing."""
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 31)

    with pytest.raises(BundleError, match=r"^golden\.npz: has 32 bytes unpacked; the limit is 31$"):
        encode(Golden((from_array("x", NUMBERS),), ()))


def test_a_false_zip_directory_is_refused() -> None:
    """At most the declared size of a member is read; numpy would read a member that is not an array at once."""
    data = a_zip(("inputs/x.npy", header((1000,)) + bytes(8000)), compression=zipfile.ZIP_DEFLATED)
    lying = data.replace((8000 + len(header((1000,)))).to_bytes(4, "little"), (200).to_bytes(4, "little"))
    assert lying != data

    with pytest.raises(BundleError, match=r"^golden\.npz: not an npz file of plain arrays"):
        decode(lying, [TensorSpec("x", "FP64", ("batch",))], [])
    with pytest.raises(BundleError, match="is not an array"):
        check_npz(a_zip(("x.npy", bytes(10_000)), compression=zipfile.ZIP_DEFLATED), "golden.npz")


@pytest.mark.parametrize("shape", [(2**61,), (2**40,), (2**31, 2**31), (-1,)])
def test_an_array_with_a_false_size_is_refused(shape: tuple[int, ...]) -> None:
    """Whether the memory for it could be had or not."""
    data = a_zip(("inputs/x.npy", header(shape) + bytes(64)))

    with pytest.raises(BundleError, match=r"^golden\.npz: "):
        decode(data, [TensorSpec("x", "FP64", ("batch",))], [])


def skops_of(data: bytes) -> Iterator[tuple[str, bytes]]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    for name in archive.namelist():
        yield name, archive.read(name)


def test_a_compressed_skops_file_is_refused() -> None:
    """Our skops files are never compressed, so reading one never yields more bytes than the file has."""
    data = a_zip(*skops_of(dump(StandardScaler().fit(NUMBERS))), compression=zipfile.ZIP_DEFLATED)

    with pytest.raises(BundleError, match=r"^pipeline\.skops: '.*' is compressed"):
        load(data)


def changed_schema(data: bytes, change: Any) -> bytes:
    members = dict(skops_of(data))
    schema = json.loads(members["schema.json"])
    return a_zip(*{**members, "schema.json": json.dumps(change(schema)).encode()}.items())


def test_a_member_that_is_read_many_times_over_is_refused() -> None:
    """One array in the file could become a million in memory."""
    data = dump(FunctionTransformer(inv_kw_args={"array": np.zeros(10_000)}))

    def repeat(schema: dict[str, Any]) -> dict[str, Any]:
        array = find(schema, "NdArrayNode")
        return {**schema, "copies": [{**array, "__id__": number} for number in range(1, 100)]}

    load(data)
    with pytest.raises(BundleError, match=r"^pipeline\.skops: its members unpack to more bytes than the file has$"):
        load(changed_schema(data, repeat))


def find(node: Any, loader: str) -> Any:
    """The first node with this loader."""
    if isinstance(node, dict):
        if node.get("__loader__") == loader:
            return node
        node = list(node.values())
    if isinstance(node, list):
        return next((found for each in node if (found := find(each, loader))), None)
    return None


def test_a_shared_object_is_read_once() -> None:
    """As skops writes it: the same array in two places is one member."""
    array = np.zeros(10_000)
    data = dump(FunctionTransformer(kw_args=None, inv_kw_args={"one": array, "two": array, "three": [array] * 5}))

    loaded = load(data)

    assert loaded.inv_kw_args["one"] is loaded.inv_kw_args["three"][4]


def test_a_sparse_matrix_that_decompresses_to_gigabytes_is_refused(bomb: bytes) -> None:
    """It is an npz inside of the skops file."""
    members = dict(skops_of(dump(FunctionTransformer(inv_kw_args={"matrix": csr_matrix(np.eye(3))}))))
    (sparse,) = (name for name in members if name.endswith(".npz"))

    with pytest.raises(BundleError, match=rf"^pipeline\.skops: {sparse}: has \d+ bytes unpacked"):
        load(a_zip(*{**members, sparse: bomb}.items()))


def test_a_schema_of_any_depth_is_checked() -> None:
    """Without exhausting the stack, also where the JSON parser would."""
    deep: Any = {"__loader__": "NdArrayNode", "file": "a.npy", "type": "numpy"}
    for _ in range(500):
        deep = [deep]

    check_skops(a_zip(("schema.json", json.dumps(deep).encode()), ("a.npy", b"x")), "pipeline.skops")


def test_golden_samples_of_millions_of_rows_are_not_read() -> None:
    """Equal rows compress to almost nothing, and each would be transformed and predicted: the header says how many there are."""
    golden = Golden((from_array("x", np.zeros((6_000_000, 1), np.int8)),), ())
    data = encode(golden)
    assert len(data) < 350_000

    with pytest.raises(BundleError, match=r'^golden\.npz: "x": expected at most 10000 rows, got 6000000$'):
        decode(data, [TensorSpec("x", "INT8", ("batch", 1))], [])


def test_golden_samples_of_text_have_the_same_limit() -> None:
    """Text is stored as wire bytes, with its shape in a separate array."""
    words = Tensor("x", "BYTES", (20_000, 0), b"")

    with pytest.raises(BundleError, match=r'^golden\.npz: "x": expected at most 10000 rows, got 20000$'):
        decode(encode(Golden((words,), ())), [TensorSpec("x", "BYTES", ("batch", 0))], [])
