"""The three services with mutual TLS between them and tokens at the edge, as processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from sklearn.preprocessing import StandardScaler

from splitserve import Client, publish_predictor, publish_preprocessor, release
from splitserve.errors import SplitserveError, Unauthenticated, Unavailable
from tests.certificates import Files, replace, write
from tests.system.models import affine_model
from tests.system.processes import System, wait_until

COMMAND = Path(sys.executable).with_name("splitserve")
TOKEN = "a-token-of-no-use-elsewhere"
ROWS = np.full((1, 3), 31337.0, np.float32)
SERVICES = ("predict", "preprocess", "proxy")


@pytest.fixture
def authorities() -> tuple[trustme.CA, trustme.CA]:
    return trustme.CA(), trustme.CA()


@pytest.fixture
def files(tmp_path: Path, authorities: tuple[trustme.CA, trustme.CA]) -> dict[str, Files]:
    return {name: write(tmp_path / name, authorities[0]) for name in (*SERVICES, "client")}


@pytest.fixture
def system(tmp_path: Path, files: dict[str, Files]) -> Iterator[System]:
    repository = tmp_path / "models"
    rows = np.ones((4, 3))
    publish_preprocessor(StandardScaler(with_mean=False).fit(rows), rows, name="m", repository=repository)
    publish_predictor(affine_model(3, 1, 1), np.ones((4, 3), np.float32), name="m", repository=repository)
    release("m", "1.1", repository=repository, accept_unknown_features=True)
    token = {"name": "shop", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest(), "models": ["m"]}
    (tmp_path / "auth.json").write_text(json.dumps({"tokens": [token]}))
    environment = {"PROXY_AUTH_FILE": str(tmp_path / "auth.json"), "LOG_REQUESTS": "all"}
    for name in SERVICES:
        ca, cert, key = files[name]
        listens = {"TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "TLS_CLIENT_CA_FILE": ca}
        calls = {"NEXT_CA_FILE": ca, "NEXT_CERT_FILE": cert, "NEXT_KEY_FILE": key}
        environment |= {f"{name.upper()}_{setting}": path for setting, path in (listens | calls).items()}
    running = System(repository, **environment)
    yield running
    running.stop()


def infer(system: System, files: Files, token: str = TOKEN) -> Any:
    with Client(system.grpc, tls=files.client, token=token) as client:
        return client.infer("m", {"features": ROWS})["scores"]


def is_served(system: System, files: Files) -> bool:
    try:
        infer(system, files)
    except SplitserveError:
        return False
    return True


def test_a_call_crosses_all_hops_over_mutual_tls(system: System, files: dict[str, Files]) -> None:
    """Callers with a certificate and a token are answered, also through the command; others are not; and no service logs tokens
    or numbers."""
    wait_until(lambda: is_served(system, files["client"]), "the model served")
    ca, cert, key = files["client"]
    token_file = Path(ca).parent / "token"
    token_file.write_text(TOKEN + "\n")
    named = {"CA": ca, "CERT": cert, "KEY": key, "TOKEN": str(token_file)}
    environment = {**os.environ, **{f"SPLITSERVE_{name}_FILE": path for name, path in named.items()}}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)

    health = command(str(COMMAND), "health", "--url", system.grpc)
    probe = command(sys.executable, "-m", "splitserve.server.probe", system.grpc, "--ready")
    repository = str(Path(ca).parents[1] / "models")
    verified = [
        command(str(COMMAND), "verify", url, "m", "--repository", repository) for url in (f"https://{system.http}", system.grpc)
    ]

    assert "READY" in health.stdout, health.stderr
    assert [(each.returncode, each.stderr) for each in verified] == [(0, ""), (0, "")]
    assert probe.returncode == 0, probe.stderr
    assert infer(system, files["client"]).tolist() == [[31338.0] * 3]
    with pytest.raises(Unauthenticated):
        infer(system, files["client"], token="")
    with Client(system.grpc, token=TOKEN, max_attempts=1) as client, pytest.raises(Unavailable):
        client.metadata("m")
    written = "\n".join(line for process in system.processes.values() for line in process.lines)
    assert '"caller":"shop"' in written
    assert TOKEN not in written
    assert "3133" not in written


def test_certificates_are_renewed_over_all_hops_without_a_failed_call(
    system: System, files: dict[str, Files], authorities: tuple[trustme.CA, trustme.CA]
) -> None:
    """P-42: another authority for every service, in the order of docs/security.md: trust both, renew, trust the new one."""
    old, new = (authority.cert_pem.bytes() for authority in authorities)
    wait_until(lambda: is_served(system, files["client"]), "the model served")
    failures: list[SplitserveError] = []
    answers: list[Any] = []
    stop = threading.Event()

    def load() -> None:
        with Client(system.grpc, tls=files["client"].client, token=TOKEN) as client:
            while not stop.is_set():
                try:
                    answers.append(client.infer("m", {"features": ROWS})["scores"][0, 0])
                except SplitserveError as error:
                    failures.append(error)

    def serve_on() -> None:
        enough = len(answers) + 50
        wait_until(lambda: failures or len(answers) >= enough, "answers after a change")

    loading = threading.Thread(target=load)
    loading.start()
    try:
        serve_on()
        for name in files:
            replace(files[name].ca, old + new)
        wait_until(lambda: all(trusts(system, name, authorities[1], files) for name in SERVICES), "both authorities trusted")
        serve_on()
        for name in files:
            write(Path(files[name].ca).parent, authorities[1])
            replace(files[name].ca, old + new)
            serve_on()
        for name in files:
            replace(files[name].ca, new)
        serve_on()
    finally:
        stop.set()
        loading.join()

    assert failures == []
    assert set(answers) == {31338.0}
    assert not trusts(system, "predict", authorities[0], files)


def trusts(system: System, name: str, authority: trustme.CA, files: dict[str, Files]) -> bool:
    """Whether a service takes a caller of this authority."""
    listening = system.processes[name].wait_for("listening")["grpc_port"]
    issued = authority.issue_cert("somebody.example")
    credentials = grpc.ssl_channel_credentials(
        Path(files[name].ca).read_bytes(), issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes()
    )
    with grpc.secure_channel(f"127.0.0.1:{listening}", credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=5)
        except grpc.RpcError:
            return False
    return True
