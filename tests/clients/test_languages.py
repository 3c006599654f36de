"""The examples in other languages, run as they stand. TypeScript is compiled against types made from the server's document."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from splitserve.arrays import from_array
from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, serving, signature
from tests.client.ways import serving_rest
from tests.clients.conftest import ENVIRONMENTS

pytestmark = [pytest.mark.intermediaries, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "languages"
GUIDE = ROOT / "docs" / "languages.md"
PENGUINS = signature(
    "penguins",
    [
        TensorSpec("island", "BYTES", ("batch", 1)),
        TensorSpec("bill_length_mm", "FP64", ("batch", 1)),
        TensorSpec("sex", "BYTES", ("batch", 1)),
    ],
    [TensorSpec("label", "BYTES", ("batch",)), TensorSpec("probabilities", "FP32", ("batch", 3))],
    version="1.1",
)


def answer(request: InferRequest) -> InferResponse:
    """Gentoo, if the row arrived as it was meant."""
    sent = {tensor.name: tensor.raw for tensor in request.inputs}
    is_whole = sent["island"].endswith(b"Dream") and np.frombuffer(sent["bill_length_mm"]) == [50.0]
    label = from_array("label", np.array(["Gentoo" if is_whole else "?"], object))
    return InferResponse("penguins", "1.1", (label, from_array("probabilities", np.eye(3, dtype=np.float32)[2:])), request.id)


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    async with serving_rest(FakeInference(PENGUINS, answer=answer)) as url:
        yield url


async def run(*command: str | Path, cwd: Path = EXAMPLES) -> str:
    """What a program prints; fails with all that it wrote if it fails."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, (out + err).decode()
    return out.decode()


def test_every_example_is_tested_and_on_the_page() -> None:
    """Every file in the folder, whole."""
    page = GUIDE.read_text()
    files = {path.name: path.read_text() for path in EXAMPLES.iterdir() if path.is_file()}

    assert files.keys() == {"Rest.java", "grpc.ts", "rest.go", "rest.py", "rest.sh", "rest.ts"}
    for name, text in files.items():
        assert f"examples/languages/{name}" in page
        assert text.strip() in page


async def test_curl(url: str) -> None:
    """V1, and V2 with the offer of HTTP/2 that curl makes."""
    rows, tensors = map(json.loads, (await run("bash", "rest.sh", url)).splitlines())

    assert rows["predictions"][0]["label"] == "Gentoo"
    assert tensors["outputs"][0]["data"] == ["Gentoo"]


async def test_python(url: str) -> None:
    """Without any package."""
    assert await run("python3", "rest.py", url) == "Gentoo\n"


async def test_go(url: str, tmp_path: Path) -> None:
    """Without any package."""
    assert (
        await run("env", f"GOCACHE={ENVIRONMENTS / 'go' / 'cache'}", "GO111MODULE=off", "go", "run", "rest.go", url) == "Gentoo\n"
    )


async def test_java(url: str) -> None:
    """Its HttpClient as it is, which offers HTTP/2 with a body."""
    assert json.loads(await run("java", "Rest.java", url))["predictions"][0]["label"] == "Gentoo"


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder with the examples and the packages that they name."""
    for name in ("rest.ts", "grpc.ts"):
        shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "node_modules").symlink_to(ENVIRONMENTS / "node" / "node_modules")
    return tmp_path


STRICT = ("--strict", "--noUncheckedIndexedAccess", "--module", "nodenext", "--target", "es2022", "--skipLibCheck")


async def test_typescript_over_rest(url: str, node: Path) -> None:
    """The types come from ``/openapi.json`` by a generator; a program that misuses them is not compiled."""
    programs = node / "node_modules" / ".bin"
    await run(programs / "openapi-typescript", f"{url}/openapi.json", "-o", "api.ts", cwd=node)
    await run(programs / "tsc", *STRICT, "rest.ts", cwd=node)
    label, row = (await run("node", "rest.js", url, cwd=node)).splitlines()
    (node / "wrong.ts").write_text((node / "rest.ts").read_text().replace("shape: [1, 1]", 'shape: "one"'))
    with pytest.raises(AssertionError, match=r"not assignable to type 'number\[\]'"):
        await run(programs / "tsc", *STRICT, "--noEmit", "wrong.ts", cwd=node)

    assert (label, json.loads(row)["label"]) == ("Gentoo", "Gentoo")


async def test_typescript_over_grpc(node: Path) -> None:
    """From the protocol's file."""
    async with serving(FakeInference(PENGUINS, answer=answer)) as address:
        await run(node / "node_modules" / ".bin" / "tsc", *STRICT, "grpc.ts", cwd=node)
        proto = ROOT / "protos" / "inference" / "inference.proto"

        assert await run("node", "grpc.js", address, proto, cwd=node) == "Gentoo\n"
