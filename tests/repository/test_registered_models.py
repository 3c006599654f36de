"""Versions of MLflow's model registry as a model repository: a fake server for the faults that a real one does not have."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from splitserve.repository import sources
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError, NotFetched
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.source import fetch_bundle
from splitserve.repository.sources import source_of
from splitserve.repository.sources.cache import Cache
from splitserve.repository.sources.mlflow_server import MlflowServer, NamedVersion, parse
from splitserve.repository.sources.registered_models import RegisteredModels
from splitserve.repository.sources.remote_folder import CANCELLED
from splitserve.repository.writable import writable
from splitserve.versions import Pair
from tests.file_server import Fault, Handler, cut, flip, stall, status
from tests.registry_server import ALIAS, RegistryServer
from tests.repository.bundles import KEY, write_bundle
from tests.repository.test_release_sources import GOLDEN, record

CHAMPION = "mlflow:m@champion"
OpenSource = Callable[..., RegisteredModels]


def repository(folder: Path, content: bytes = b"graph", model: str = "m") -> Repository:
    """A model with both halves and a release."""
    found = Repository(folder)
    write_bundle(found, BundleKey(model, "preprocess", 1), {"pipeline.skops": content})
    write_bundle(found, BundleKey(model, "predict", 1), {"model.onnx": content})
    record(found.root, model=model)
    return found


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RegistryServer]:
    """With version 1 of m as its champion; the environment names it."""
    for name in ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with RegistryServer(tmp_path / "artifacts").running() as running:
        assert isinstance(running, RegistryServer)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", running.url)
        running.register("m", "1", repository(running.folder / "1/run/artifacts/model"))
        yield running


@pytest.fixture
def open_source(tmp_path: Path) -> Iterator[OpenSource]:
    """Creates sources like processes that share a cache, one after the other."""
    opened: list[RegisteredModels] = []

    def open_it(where: str = CHAMPION, **options: float) -> RegisteredModels:
        source = source_of(where, cache=str(tmp_path / "cache"), **options)
        assert isinstance(source, RegisteredModels)
        opened.append(source)
        return source

    yield open_it
    for source in opened:
        source.close()


def content(source: RegisteredModels, model: str = "m") -> bytes:
    """The file of the model's predictor that serves by default, as it is loaded."""
    route = source.route(model)
    assert route is not None
    return fetch_bundle(source, BundleKey(model, "predict", route.named()[0].predictor)).read("model.onnx")


def problem_of(source: RegisteredModels) -> str:
    with pytest.raises(NotFetched) as caught:
        list(source.bundles())
    return str(caught.value)


def test_an_alias_is_a_model_repository(server: RegistryServer, open_source: OpenSource) -> None:
    """Its bundles, releases and golden samples are those of the version's files."""
    source = open_source()

    assert [str(key) for key in source.bundles()] == ["m/predict/1", "m/preprocess/1"]
    assert content(source) == b"graph"
    assert source.released_models() == ["m"]
    (release,) = ReleaseReader(source).history("m").active()
    found = source.open_release(release.key)
    found.fetch()
    assert found.read("golden.npz") == GOLDEN
    assert source.stamp(release.key)


def test_a_version_is_served_under_its_own_number(server: RegistryServer, open_source: OpenSource) -> None:
    """Whatever its halves are called in its repository: only its newest release that is not withdrawn counts."""
    found = Repository(server.folder / "7/run/artifacts/model")
    for kind, version in (("preprocess", 3), ("predict", 4), ("predict", 5)):
        write_bundle(found, BundleKey("m", kind, version), {"model.onnx": bytes([version])})
    record(found.root, "3.4")
    record(found.root, "3.5")
    record(found.root, withdraws=2, pair="3.5")
    server.register("m", "7", found)
    source = open_source()

    assert [str(key) for key in source.bundles()] == ["m/predict/7", "m/preprocess/7"]
    assert content(source) == b"\x04"
    (release,) = ReleaseReader(source).history("m").active()
    assert (str(release.key), release.pair) == ("m/releases/0007-7.7", Pair(7, 7))
    assert fetch_bundle(source, BundleKey("m", "predict", 7)).manifest.version == 7


def test_a_version_may_be_named_by_its_number(server: RegistryServer, open_source: OpenSource) -> None:
    """Then no alias moves it."""
    server.register("m", "2", repository(server.folder / "2/run/artifacts/model", b"other"))

    assert content(open_source("mlflow:m/1")) == b"graph"
    assert content(open_source("mlflow:m/2")) == b"other"


def test_a_moved_alias_is_found_at_the_next_poll(server: RegistryServer, open_source: OpenSource) -> None:
    """The version that was meant before stays, to serve until the new one is loaded; back and forth."""
    source = open_source()
    reader = ReleaseReader(source)
    list(source.bundles())
    server.register("m", "2", repository(server.folder / "2/run/artifacts/model", b"other"))

    assert content(source) == b"graph"  # until it polls
    assert [str(key) for key in source.bundles()] == ["m/predict/1", "m/predict/2", "m/preprocess/1", "m/preprocess/2"]
    assert content(source) == b"other"
    assert [str(each.pair) for each in reader.history("m").active()] == ["1.1", "2.2"]

    server.aliases[("m", "champion")] = "1"
    list(source.bundles())
    assert content(source) == b"graph"
    assert [str(each.pair) for each in reader.history("m").active()] == ["1.1", "2.2"]

    server.register("m", "3", repository(server.folder / "4/run/artifacts/model", b"third"))
    list(source.bundles())
    assert content(source) == b"third"
    assert [str(each.pair) for each in reader.history("m").active()] == ["1.1", "3.3"]


def test_a_poll_of_an_unmoved_alias_reads_no_file(server: RegistryServer, open_source: OpenSource) -> None:
    """A registered version never changes."""
    source = open_source()
    list(source.bundles())
    n_before = len(server.requests)

    list(source.bundles())

    assert [path for path, _ in server.requests[n_before:]] == [ALIAS, "api/2.0/mlflow/model-versions/get-download-uri"]


def test_a_version_that_was_deleted_and_registered_again_is_another_one(server: RegistryServer, open_source: OpenSource) -> None:
    """MLflow gives the number of a deleted version again."""
    source = open_source()
    list(source.bundles())
    server.register("m", "1", repository(server.folder / "3/run/artifacts/model", b"other"))

    list(source.bundles())

    assert content(source) == b"other"


def test_a_version_that_cannot_be_read_is_read_again_after_a_while(server: RegistryServer, tmp_path: Path) -> None:
    """Twice as long each time; another version is read at once."""
    now, file = 0.0, "1/run/artifacts/model/index.json"
    registry = MlflowServer(server.url, {}, timeout_s=60)
    source = RegisteredModels(
        parse(CHAMPION), registry, registry, Cache(tmp_path / "cache"), serves=lambda _: True, timeout_s=60, clock=lambda: now
    )
    indexed = (server.folder / file).read_bytes()
    (server.folder / file).write_bytes(indexed + b" ")
    reads = []
    for now in (0, 0.5, 1, 2.5):  # noqa: B007 - the source's clock
        assert "version 1: " in problem_of(source)
        reads.append(len(server.asked(file)))
    assert reads == [1, 1, 2, 2]

    (server.folder / file).write_bytes(indexed)
    now = 3
    list(source.bundles())
    assert content(source) == b"graph"

    server.register("m", "2", repository(server.folder / "2/run/artifacts/model", b"other"))
    (server.folder / "2/run/artifacts/model/index.json").write_bytes(b"")
    assert "version 2: " in problem_of(source)
    server.register("m", "3", repository(server.folder / "3/run/artifacts/model", b"third"))
    list(source.bundles())
    assert content(source) == b"third"
    source.close()


def test_a_version_that_is_no_longer_held_ends_its_downloads(server: RegistryServer, open_source: OpenSource) -> None:
    """Two moves of the alias later; what the later ones share with it stays usable."""
    source, started, moved = open_source(), threading.Event(), threading.Event()
    list(source.bundles())

    def held(handler: Handler, body: bytes) -> bool:
        handler.answer(200, body[:1], size=len(body))
        started.set()
        moved.wait()
        handler.wfile.write(body[1:])
        return True

    server.fail("1/run/artifacts/model/m/predict/1/model.onnx", held)
    problems: list[str] = []

    def load() -> None:
        try:
            content(source)
        except BundleError as error:
            problems.append(str(error))

    thread = threading.Thread(target=load)
    thread.start()
    started.wait()
    for version, written in (("2", b"other"), ("3", b"third")):
        server.register("m", version, repository(server.folder / version / "run/artifacts/model", written))
        list(source.bundles())
    moved.set()
    thread.join(30)

    assert not thread.is_alive()
    assert problems == [f"m/predict/1: model.onnx: {CANCELLED}"]
    assert content(source) == b"third"


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_artifacts_in_a_folder_are_read_there(server: RegistryServer, open_source: OpenSource, tmp_path: Path, form: str) -> None:
    """As MLflow writes them that are on the server's own disk."""
    root = tmp_path / "elsewhere"
    server.register("m", "2", repository(root, b"other"), uri=form.format(root))

    assert content(open_source()) == b"other"


def test_artifacts_may_be_in_any_store_of_fsspec(
    server: RegistryServer, open_source: OpenSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its credentials, not with MLflow's."""
    import fsspec

    monkeypatch.setitem(sources._NEEDS, "memory", ("fsspec", "none"))
    server.register("m", "2", repository(tmp_path / "models", b"other"), uri="memory://registry/m/2")
    fsspec.filesystem("memory").put(f"{tmp_path}/models/", "/registry/m/2/", recursive=True)

    assert content(open_source()) == b"other"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("mlflow:other@champion", "mlflow:other@champion: {url}: not found: Registered Model with name=other not found"),
        ("mlflow:m@staging", "mlflow:m@staging: {url}: HTTP status 400 Registered model alias staging not found."),
        ("mlflow:m/7", "mlflow:m/7: {url}: not found: Model Version (name=m, version=7) not found"),
    ],
)
def test_what_the_registry_does_not_have_is_named(
    server: RegistryServer, open_source: OpenSource, where: str, message: str
) -> None:
    """In the server's words. It is asked again, since it may get it."""
    assert problem_of(open_source(where)) == message.format(url=server.url)


def answering(number: int, data: bytes) -> Fault:
    def fault(handler: Handler, body: bytes) -> bool:
        handler.answer(number, data)
        return True

    return fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(503), "HTTP status 503 Service Unavailable"),
        (answering(500, json.dumps({"message": "database is\nlocked"}).encode()), "HTTP status 500 database is locked"),
        (status(302), "HTTP status 302 Found"),
        (answering(200, b"<html>Sign in</html>"), "expected an answer of MLflow, got another"),
        (answering(200, b'{"model_version": {}}'), "missing required field `version`"),
        (answering(200, b"[" * 100_000), "expected an answer of MLflow"),
        (answering(200, b" " * (16 * 1024**2 + 1)), "registered-models/alias is too large; the limit is 16777216 bytes"),
        (cut, "RemoteProtocolError"),
    ],
    ids=["busy", "fails", "redirects", "a page", "no version", "nested", "huge", "cut"],
)
def test_a_server_that_does_not_answer_is_asked_again(
    server: RegistryServer, open_source: OpenSource, fault: Fault, message: str
) -> None:
    """What was read stays, and the reason is told."""
    source = open_source()
    server.fail(ALIAS, fault)

    assert message in problem_of(source)
    list(source.bundles())
    assert content(source) == b"graph"


def test_a_server_that_stalls_is_given_up(server: RegistryServer, open_source: OpenSource) -> None:
    """After MODEL_FETCH_TIMEOUT_S without a byte."""
    server.fail(ALIAS, stall)

    assert problem_of(open_source(timeout_s=0.1)) == f"mlflow:m@champion: {server.url}: no answer within 0.1 s"


def test_a_server_that_is_away_is_named_without_credentials(
    server: RegistryServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its URL may have a password."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")

    assert problem_of(open_source()) == "mlflow:m@champion: http://127.0.0.1:1: ConnectError: [Errno 111] Connection refused"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"USERNAME": "user", "PASSWORD": "secret"}, "Basic " + base64.b64encode(b"user:secret").decode()),
        ({"TOKEN": "token"}, "Bearer token"),
        ({"USERNAME": "user", "PASSWORD": "secret", "TOKEN": "token"}, "Basic " + base64.b64encode(b"user:secret").decode()),
    ],
    ids=["password", "token", "both"],
)
def test_credentials_are_those_of_mlflow(
    server: RegistryServer,
    open_source: OpenSource,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    expected: str,
) -> None:
    """For the registry and for artifacts that it proxies."""
    for name, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    server.authorization = expected

    assert content(open_source()) == b"graph"
    assert server.authorizations == {expected}


@pytest.mark.parametrize(("token", "number"), [("", 401), ("wrong", 403)])
def test_a_refusal_says_which_variables_are_the_credentials(
    server: RegistryServer, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch, token: str, number: int
) -> None:
    """Not what was in them."""
    server.authorization = "Bearer right"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)

    problem = problem_of(open_source())

    assert f"{server.url}: access denied: HTTP status {number}" in problem
    assert "MLFLOW_TRACKING_TOKEN" in problem
    assert "wrong" not in problem


def test_proxied_artifacts_of_another_server_are_refused(server: RegistryServer, open_source: OpenSource) -> None:
    """It would get the credentials of this one."""
    server.uris[("m", "1")] = "mlflow-artifacts://elsewhere:5000/1/run/artifacts/model"

    assert "version 1: mlflow-artifacts://elsewhere:5000/1/run/artifacts/model: expected artifacts of" in problem_of(
        open_source()
    )


def test_a_store_that_cannot_be_read_here_is_named(server: RegistryServer, open_source: OpenSource) -> None:
    """With what can."""
    server.uris[("m", "1")] = "dbfs:/1/run"

    assert "artifacts at dbfs:/1/run: " in problem_of(open_source())


def test_a_version_without_a_release_serves_nothing(server: RegistryServer, open_source: OpenSource) -> None:
    """It says what makes one."""
    found = Repository(server.folder / "8/run/artifacts/model")
    write_bundle(found)
    server.register("m", "8", found)

    assert problem_of(open_source()).endswith(
        "version 8: its repository has no release; the build step of a training pipeline makes one"
    )


def test_a_version_that_is_not_ready_is_not_read(server: RegistryServer, open_source: OpenSource) -> None:
    """It may become it."""
    server.versions[("m", "1")]["status"] = "PENDING_REGISTRATION"

    assert "version 1 is PENDING_REGISTRATION, expected READY" in problem_of(open_source())


def test_files_that_were_replaced_after_they_were_registered_are_refused(server: RegistryServer, open_source: OpenSource) -> None:
    """From the tag of the version down: index, manifests, files."""
    root = server.folder / "1/run/artifacts/model"
    index_file, model_file = root / "index.json", root / str(KEY) / "model.onnx"
    indexed, model = index_file.read_bytes(), model_file.read_bytes()

    index_file.write_bytes(indexed + b" ")
    assert "index.json: expected sha256" in problem_of(open_source())
    index_file.write_bytes(indexed)

    model_file.write_bytes(model[:-1] + b"!")
    source = open_source()
    with pytest.raises(BundleError, match=r"m/predict/1: model.onnx: expected 5 bytes, sha256 .*; got 5 bytes.*, twice in a row"):
        content(source)


def test_a_version_without_an_index_says_what_writes_one(server: RegistryServer, open_source: OpenSource) -> None:
    """A folder that was registered by hand needs one; the tag that has its digest may be missing then."""
    server.versions[("m", "1")]["tags"] = []
    assert content(open_source()) == b"graph"

    (server.folder / "1/run/artifacts/model/index.json").unlink()
    assert 'index.json: not found: Not Found; "splitserve index" writes it' in problem_of(open_source())


@pytest.mark.parametrize("fault", [cut, flip], ids=["cut", "damaged"])
def test_a_download_that_breaks_off_goes_on(server: RegistryServer, open_source: OpenSource, fault: Fault) -> None:
    """From where it was; one that is damaged is fetched once more."""
    large = random.Random(0).randbytes(2**20)  # no two blocks of it are equal
    server.register("m", "2", repository(server.folder / "2/run/artifacts/model", large))
    path = "2/run/artifacts/model/m/predict/1/model.onnx"
    server.fail(path, fault_as_whole(fault))

    assert content(open_source()) == large
    assert len(server.asked(path)) == 2


def fault_as_whole(fault: Fault) -> Fault:
    """The fault of an answer without ranges: status 200."""

    def changed(handler: Handler, body: bytes) -> bool:
        answer = handler.answer
        handler.answer = lambda _, *rest, **more: answer(200, *rest, **more)  # type: ignore[method-assign]
        return fault(handler, body)

    return changed


def test_closing_ends_a_download(server: RegistryServer, open_source: OpenSource) -> None:
    """So that a service can stop."""
    source, started = open_source(), threading.Event()
    list(source.bundles())

    def held(handler: Handler, body: bytes) -> bool:
        handler.answer(200, body[:1], size=len(body))
        started.set()
        handler.files.stopping.wait()
        return True

    server.fail("1/run/artifacts/model/m/predict/1/model.onnx", held, held)
    problems: list[str] = []

    def load() -> None:
        try:
            content(source)
        except BundleError as error:
            problems.append(str(error))

    thread = threading.Thread(target=load)
    thread.start()
    started.wait()
    source.close()
    thread.join(30)

    assert not thread.is_alive()
    assert "the service is stopping" in problems[0]


def test_several_models_do_not_affect_each_other(server: RegistryServer, open_source: OpenSource) -> None:
    """One that cannot be read keeps what it had, and its releases say why; one that never could be is listed too."""
    server.register("n", "1", repository(server.folder / "5/run/artifacts/model", b"n", "n"))
    source = open_source("mlflow:m@champion, n@champion,o@champion")

    assert [str(key) for key in source.bundles()] == ["m/predict/1", "m/preprocess/1", "n/predict/1", "n/preprocess/1"]
    assert source.released_models() == ["m", "n", "o"]
    with pytest.raises(NotFetched, match="mlflow:o@champion: .*Registered Model with name=o not found"):
        source.releases("o")

    del server.aliases[("n", "champion")]
    assert BundleKey("n", "predict", 1) in source.bundles()
    assert content(source, "n") == b"n"
    with pytest.raises(NotFetched, match="mlflow:n@champion: .*alias champion not found"):
        source.releases("n")
    assert len(source.releases("m")) == 1


def test_two_versions_with_the_same_model_are_refused(server: RegistryServer, open_source: OpenSource) -> None:
    """The first keeps serving; the other is not mixed with it."""
    server.register("n", "1", repository(server.folder / "5/run/artifacts/model", b"n"))
    source = open_source("mlflow:m@champion,n@champion")

    assert [str(key) for key in source.bundles()] == ["m/predict/1", "m/preprocess/1"]
    assert content(source) == b"graph"
    with pytest.raises(NotFetched, match="mlflow:n@champion has a model m, as mlflow:m@champion; serve one of them"):
        source.releases("m")


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ("mlflow:", "''"),
        ("mlflow:m", "'m'"),
        ("mlflow:m@", "'m@'"),
        ("mlflow:m/champion", "'m/champion'"),
        ("mlflow:m/0", "'m/0'"),
        ("mlflow:m@champion,", "''"),
        ("mlflow://m@champion", "'//m@champion'"),
    ],
)
def test_what_names_no_version_is_refused_at_start(server: RegistryServer, where: str, part: str) -> None:
    """Before anything is asked."""
    with pytest.raises(ValueError, match="expected mlflow:MODEL@ALIAS or mlflow:MODEL/VERSION") as caught:
        sources.check(where)
    assert str(caught.value).endswith(f"got {part}")
    assert server.requests == []


def test_names_are_what_mlflow_allows(server: RegistryServer) -> None:
    """Blanks and dots too."""
    assert parse("mlflow:my model@v1.2, n/12") == [NamedVersion("my model", "v1.2", ""), NamedVersion("n", "", "12")]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "mlflow: needs MLFLOW_TRACKING_URI, the URL of a tracking server"),
        (
            "sqlite:////user:secret@x",
            "MLFLOW_TRACKING_URI: expected the URL of a tracking server, http:// or https://, got sqlite:",
        ),
        ("databricks", "MLFLOW_TRACKING_URI: expected the URL of a tracking server"),
    ],
)
def test_a_start_without_a_server_is_refused(monkeypatch: pytest.MonkeyPatch, uri: str, message: str) -> None:
    """With the variable's name."""
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    with pytest.raises(ValueError, match=message):
        source_of(CHAMPION)


def test_a_registry_of_its_own_is_asked_and_the_tracking_server_has_the_files(
    server: RegistryServer, open_source: OpenSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MLflow does with MLFLOW_REGISTRY_URI."""
    with RegistryServer(server.folder).running() as registry:
        assert isinstance(registry, RegistryServer)
        registry.register("m", "9", Repository(server.folder / "1/run/artifacts/model"))
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry.url)

        assert content(open_source("mlflow:m/9")) == b"graph"

        assert {path.split("/")[0] for path, _ in registry.requests} == {"api"}
        assert "api" not in {path.split("/")[0] for path, _ in server.requests}


def test_the_registry_is_not_published_to(server: RegistryServer) -> None:
    """A training pipeline does that."""
    with pytest.raises(ValueError, match=r"mlflow:m@champion cannot be written: the register step"):
        writable(CHAMPION)


@pytest.mark.parametrize("missing", ["httpx", "fsspec"])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """With the command that installs them."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)

    with pytest.raises(ValueError, match=rf'mlflow: needs more packages \({missing}\): pip install "splitserve\[registry\]"'):
        sources.check(CHAMPION)


@pytest.mark.heavy
def test_mlflow_is_not_imported(server: RegistryServer, tmp_path: Path) -> None:
    """Nor anything else of training."""
    program = (
        "import sys; from splitserve.repository.sources import source_of; from splitserve.repository.source import fetch_bundle;"
        f"source = source_of({CHAMPION!r}, cache={str(tmp_path / 'cache')!r});"
        "[fetch_bundle(source, key) for key in source.bundles()];"
        "print(sorted({'mlflow', 'sqlalchemy', 'sklearn', 'pandas'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip() == "[]"
