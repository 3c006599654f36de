"""Loads what is about to be published as a service will: in a process that has not imported what the publisher has.

The publisher's process knows more than a service: classes of ``__main__``, modules that it has imported, what those have changed.
A bundle that loads only there would be dead when served, so it is loaded and run in a fresh process first. Importing scikit-learn
takes a second or two; one process is kept, and forks for each check.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from io import BufferedReader
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from splitserve.errors import SplitserveError
from splitserve.publishing.errors import PublishError

_MODULE = "splitserve.publishing.as_served"
_GOLDEN, _MODEL, _SAMPLES = "expected.npz", "model.onnx", "samples.npz"

_TICK_S = 0.1
"""Waiting for an answer is interrupted after so many seconds at most; it is done in native code, which nothing interrupts."""

_ENDS_IN_S = 60.0 if hasattr(os, "fork") else 0.0
"""Seconds in which the process may end by itself, and end what it has forked."""


def check(
    preprocessor: Any,
    predictor: Any = None,
    *,
    trusted_modules: Sequence[str] = (),
    allow_pickle: bool = False,
    inputs: Sequence[Any] = (),
) -> None:
    """Load the halves in a fresh process and compare their answers with those of this one.

    Args:
        preprocessor: the half, or None.
        predictor: the half, or None.
        trusted_modules: as for `publish`.
        allow_pickle: as for `publish`.
        inputs: raw rows (n_rows, …) that the whole answers.

    Raises:
        PublishError: a service would refuse to load them, or answer differently.
    """
    from splitserve.publishing.halves import repository_at, write
    from splitserve.repository import golden as goldens
    from splitserve.repository.golden import Golden
    from splitserve.runtimes.release import WholeRelease

    halves = [half for half in (preprocessor, predictor) if half is not None]
    with tempfile.TemporaryDirectory() as folder:
        bundles = write(repository_at(folder), *halves, version=1)
        if preprocessor is not None and predictor is not None and inputs:
            answers = WholeRelease(preprocessor.runtime, predictor.runtime).infer(inputs)
            (Path(folder) / _GOLDEN).write_bytes(goldens.encode(Golden(tuple(inputs), answers)))
        request = {
            "folder": folder,
            "name": bundles[0].key.model,
            "kinds": [bundle.key.kind for bundle in bundles],
            "trusted_modules": list(trusted_modules),
            "allow_pickle": allow_pickle,
            "path": sys.path,
        }
        reason = _process().ask(request)
    if reason:
        raise PublishError(f"a service could not serve this: {reason}{_way_out(reason)}")


def check_model(model: bytes, inputs: Sequence[Any]) -> None:
    """Load an ONNX model in a fresh process and run it there first: a model that never returns keeps that process, not this one.

    Errors are left to the caller, which does the same next.

    Args:
        model: the file's bytes.
        inputs: tensors (n_samples, …).

    Raises:
        PublishError: it ends the process.
    """
    from splitserve.repository import golden as goldens
    from splitserve.repository.golden import Golden

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _MODEL).write_bytes(model)
        (Path(folder) / _SAMPLES).write_bytes(goldens.encode(Golden(tuple(inputs), ())))
        reason = _process().ask({"folder": folder, "path": sys.path})
    if reason:
        raise PublishError(f"a service could not serve this: {reason}")


def start() -> None:
    """Start the process, so that it is there when `check` needs it."""
    _process()


def _way_out(reason: str) -> str:
    if "__main__" not in reason:
        import sklearn

        output = sklearn.get_config()["transform_output"]
        if output == "default":
            return ""
        return (
            f'; set_config(transform_output="{output}") holds in this process alone: keep it in the pipeline, with '
            f'pipeline.set_output(transform="{output}")'
        )
    return (
        "; functions and classes of a notebook or script exist only there: put them into a module that the services have "
        "installed, and name it in trusted_modules"
    )


class _Process:
    """The fresh process, and its pipes. Its answers are lines of JSON."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Queue[bytes] = Queue()
        self._popen = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; import {_MODULE} as served; served.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        atexit.register(self.close)

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self._answers.put(line)
        self._answers.put(b"")

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def ask(self, request: dict[str, Any]) -> str:
        with self._lock:
            assert self._popen.stdin is not None
            try:
                self._popen.stdin.write(json.dumps(request).encode() + b"\n")
                self._popen.stdin.flush()
                reason: str = json.loads(self._next_answer())["reason"]
            except (OSError, ValueError, KeyError):
                self.close()
                return (
                    "the process that loaded the halves ended without an answer, and a service might end, too; check that the "
                    "transforms' modules can be imported in a process of their own"
                )
            except BaseException:  # interrupted: the answer that is still to come belongs to nobody
                self.close()
                raise
            return reason

    def _next_answer(self) -> bytes:
        while True:
            with suppress(Empty):
                return self._answers.get(timeout=_TICK_S)

    def close(self) -> None:
        """End the process."""
        atexit.unregister(self.close)
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        with suppress(OSError):  # what was still to be written
            self._popen.stdin.close()
        try:
            self._popen.wait(_ENDS_IN_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        else:
            self._reader.join()
            self._popen.stdout.close()


def _process() -> _Process:
    process = _started(os.getpid())
    if not process.is_running:
        process.close()
        _started.cache_clear()
        process = _started(os.getpid())
    return process


@cache
def _started(_: int) -> _Process:
    return _Process()


def serve() -> None:
    """Answer requests from stdin, each in a process of its own, until stdin ends; then that process is ended, too."""
    from splitserve.runtimes import compiled, predictor, preprocessor, sklearn_pipeline  # noqa: F401  (imported once, for all)
    from splitserve.runtimes.plans import planner  # noqa: F401

    requests = sys.stdin.buffer
    assert isinstance(requests, BufferedReader)
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for line in requests:
        if not hasattr(os, "fork"):
            _answer(line, out)
            return  # what this request has imported must not help the next
        ends, keeps = os.pipe()  # the first is readable once nobody has the second, which is when the child has ended
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _answer(line, out)
                code = 0
            finally:
                os._exit(code)
        os.close(keeps)
        ready, _, _ = select.select([requests.fileno(), ends], [], [])
        os.close(ends)
        if ends not in ready and not requests.peek(1):  # stdin has ended, and nobody waits for the answer
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        _, status = os.waitpid(child, 0)  # or the next request is there, since this one was answered
        if status:
            os.write(out, json.dumps({"reason": "loading it ends the process"}).encode() + b"\n")


def _answer(line: bytes, out: int) -> None:
    request = json.loads(line)
    sys.path[:] = request["path"]
    reason = _refusal(request) if "kinds" in request else _run_model(Path(request["folder"]))
    os.write(out, json.dumps({"reason": reason}).encode() + b"\n")


def _run_model(folder: Path) -> str:
    from splitserve.repository import golden as goldens
    from splitserve.runtimes.predictor import Predictor

    with suppress(Exception):  # which the publisher's own run raises, too
        model = Predictor((folder / _MODEL).read_bytes())
        model.infer(goldens.decode((folder / _SAMPLES).read_bytes(), model.inputs, ()).inputs)
    return ""


def _refusal(request: dict[str, Any]) -> str:
    """Why a service would refuse the halves, or answer differently; "" if it would not."""
    from splitserve.publishing.proof import tolerances_of
    from splitserve.repository import golden as goldens
    from splitserve.repository.bundle import BundleKey
    from splitserve.repository.folder import Repository
    from splitserve.repository.manifest import PLAN_FILE, BundleError
    from splitserve.repository.source import load_bundle
    from splitserve.runtimes import predictor, preprocessor
    from splitserve.runtimes.release import WholeRelease

    def load_preprocessor(bundle: Any) -> preprocessor.Preprocessor:
        trusted, is_pickle_allowed = request["trusted_modules"], request["allow_pickle"]
        load = partial(preprocessor.load, bundle, trusted_modules=trusted, allow_unsafe_pickle=is_pickle_allowed)
        if bundle.manifest.portable and PLAN_FILE in bundle.manifest.files:
            load(runtime="sklearn")  # what serves where the plan cannot
        return load()

    repository = Repository(Path(request["folder"]))
    loaders: dict[str, Any] = {"preprocess": load_preprocessor, "predict": predictor.load}
    try:
        loaded = [load_bundle(repository, BundleKey(request["name"], kind, 1), loaders[kind]) for kind in request["kinds"]]
        expected = Path(request["folder"]) / _GOLDEN
        if not expected.exists():
            return ""
        whole = WholeRelease(*loaded)
        golden = goldens.decode(expected.read_bytes(), whole.inputs, whole.outputs)
        worst = goldens.worst_difference(golden.outputs, whole.infer(golden.inputs), tolerances_of(golden.outputs))
        return f"in a fresh process, {worst}" if worst else ""
    except (BundleError, SplitserveError) as error:
        return str(error)
    except Exception as error:  # what a service would log, too
        return f"{type(error).__name__}: {error}"
