"""Loads what is about to be published as a service will: in a process that has not imported what the publisher has.

The publisher's process knows more than a service: classes of ``__main__``, modules that it has imported, what those have changed.
A bundle that loads only there would be dead when served, so it is loaded and run in a fresh process first. Importing scikit-learn
takes a second or two; one process is kept, and forks for each check.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from splitserve.errors import SplitserveError
from splitserve.publishing.errors import PublishError

_MODULE = "splitserve.publishing.as_served"
_GOLDEN = "expected.npz"


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
        complaint = _process().ask(request)
    if complaint:
        raise PublishError(f"a service could not serve this: {complaint}{_way_out(complaint)}")


def start() -> None:
    """Start the process, so that it is there when `check` needs it."""
    _process()


def _way_out(complaint: str) -> str:
    if "__main__" not in complaint:
        return ""
    return (
        "; functions and classes of a notebook or script exist only there: put them into a module that the services have "
        "installed, and name it in trusted_modules"
    )


class _Process:
    """The fresh process, and its pipes. Its answers are lines of JSON."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._popen = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; import {_MODULE} as served; served.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        atexit.register(self.close)

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def ask(self, request: dict[str, Any]) -> str:
        with self._lock:
            assert self._popen.stdin is not None
            assert self._popen.stdout is not None
            try:
                self._popen.stdin.write(json.dumps(request).encode() + b"\n")
                self._popen.stdin.flush()
                line = self._popen.stdout.readline()
                complaint: str = json.loads(line)["complaint"]
            except (OSError, ValueError, KeyError):
                self.close()
                return (
                    "the process that loaded the halves ended without an answer, and a service might end, too; check that the "
                    "transforms' modules can be imported in a process of their own"
                )
            except BaseException:  # interrupted: the answer that is still to come belongs to nobody
                self.close()
                raise
            return complaint

    def close(self) -> None:
        """End the process."""
        atexit.unregister(self.close)
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was still to be written
                    pipe.close()


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
    """Answer requests from stdin, each in a process of its own, until stdin ends."""
    from splitserve.runtimes import compiled, predictor, preprocessor  # noqa: F401  (imported once, for all)

    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin.buffer:
        if not hasattr(os, "fork"):
            _answer(line, out)
            return  # what this request has imported must not help the next
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _answer(line, out)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            os.write(out, json.dumps({"complaint": "loading it ends the process"}).encode() + b"\n")


def _answer(line: bytes, out: int) -> None:
    request = json.loads(line)
    sys.path[:] = request["path"]
    os.write(out, json.dumps({"complaint": _complaint(request)}).encode() + b"\n")


def _complaint(request: dict[str, Any]) -> str:
    """Why a service would refuse the halves, or answer differently; "" if it would not."""
    from splitserve.publishing.proof import tolerances_of
    from splitserve.repository import golden as goldens
    from splitserve.repository.bundle import BundleKey
    from splitserve.repository.folder import Repository
    from splitserve.repository.manifest import BundleError
    from splitserve.repository.source import load_bundle
    from splitserve.runtimes import predictor, preprocessor
    from splitserve.runtimes.release import WholeRelease

    def load_preprocessor(bundle: Any) -> preprocessor.Preprocessor:
        trusted, is_pickle_allowed = request["trusted_modules"], request["allow_pickle"]
        return preprocessor.load(bundle, trusted_modules=trusted, allow_unsafe_pickle=is_pickle_allowed)

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
