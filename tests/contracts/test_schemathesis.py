"""Requests that the OpenAPI document allows, and some that it does not, made up by schemathesis and sent to the real face."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from pathlib import Path

import pytest

from tests.budgets import seconds
from tests.contracts.faces import Served, served

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.line("6.4"), pytest.mark.timeout(300), pytest.mark.heavy]

MAX_TIME_S = seconds(25)

CHECKS = (
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "not_a_server_error",
)


async def test_the_document_is_exact(system: Served, tmp_path: Path) -> None:
    """No status, header or body that is not documented, and no 5xx; `:explain`, which is always one, is left out."""
    code, output = await schemathesis(system, await document_of(system, tmp_path))

    assert code == 0, output


@pytest.mark.parametrize("token", ["open-sesame", "wrong"])
async def test_the_document_is_exact_with_authentication(tmp_path: Path, token: str) -> None:
    """With those of a caller who may call one model, and with a wrong one."""
    policy = {"tokens": [{"name": "one", "sha256": hashlib.sha256(b"open-sesame").hexdigest(), "models": ["echo"]}]}
    (tmp_path / "auth.json").write_text(json.dumps(policy))
    async with served(auth_file=str(tmp_path / "auth.json")) as system:
        file = await document_of(system, tmp_path)

        code, output = await schemathesis(system, file, "--header", f"Authorization: Bearer {token}", max_time_s=seconds(10))

    assert code == 0, output


async def document_of(system: Served, tmp_path: Path) -> Path:
    document = (await system.rest.get("/openapi.json")).json()
    for name, values in (("model", ["echo", "nope"]), ("version", ["1.1", "9.9"])):  # made-up ones would all be 404
        document["components"]["parameters"][name]["schema"] = {"enum": values}
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(document))
    return file


async def schemathesis(system: Served, file: Path, *options: str, max_time_s: int = MAX_TIME_S) -> tuple[int | None, str]:
    """Exit code and output of a bounded run."""
    command = ["run", str(file), "--url", str(system.rest.base_url), "--checks", ",".join(CHECKS), *options]
    command += ["--exclude-path-regex", ":explain$", "--max-time", str(max_time_s)]
    bounds = ["--max-examples", "8", "--seed", "1", "--generation-deterministic", "--no-color"]
    phases = ["--phases", "examples,coverage,fuzzing"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", *command, *bounds, *phases,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=file.parent,
    )  # fmt: skip
    output, _ = await process.communicate()
    return process.returncode, output.decode()
