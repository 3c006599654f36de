"""The process of one step: ``python -m splitserve.pipeline.worker call.json``.

In a container it gets the URL of its attempt's folder instead, where the call and the inputs are, and which gets the outputs.
It ends, with all that it has started, when the runner ends: its standard input is a pipe that the runner holds open.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path

from splitserve.pipeline.context import Call, Context, StepFailed, error_message, first_of
from splitserve.pipeline.digests import digests_of_folder
from splitserve.pipeline.environment import differences
from splitserve.pipeline.exchange import Exchange

EXIT_FAILED, EXIT_CRASHED, EXIT_INTERRUPTED = 3, 4, 130
"""Exit codes: the step raised `StepFailed`; it raised something else. In both cases the call's ``error`` file says what."""

CALL = "call.json"
"""The call, in the attempt's folder."""

WRITTEN = "written.json"
"""What a step in a container has written: the digest of each output. The last file that it sends."""


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a script has started the run in the background
    threading.Thread(target=end_with_the_runner, daemon=True).start()
    given = sys.argv[1]
    if "://" in given:
        return _run_in_container(Exchange(given))
    return _run(Call(**json.loads(Path(given).read_text())))


def _run_in_container(exchange: Exchange) -> int:
    call = Call(**json.loads(exchange.read(CALL)))
    outputs, error = Path(call.outputs), Path(call.error)
    try:
        exchange.fetch(call.fetched, outputs.parent)
        outputs.mkdir()
        code = _run(call)
        if not code:
            written = digests_of_folder(outputs)
            for path in written:
                exchange.send(f"outputs/{path}", outputs / path)
            (outputs.parent / WRITTEN).write_text(json.dumps(written))
            exchange.send(WRITTEN, outputs.parent / WRITTEN)
    except StepFailed as failure:
        error.write_text(str(failure))
        code = EXIT_FAILED
    if error.exists():
        exchange.send(error.name, error)
    return code


def _run(call: Call) -> int:
    if differing := differences(call.locked):
        print(f"{call.step}: warning: the environment is not that of the lock: {first_of(differing)}", flush=True)
    try:
        scratch = Path(call.scratch)
        scratch.mkdir(parents=True, exist_ok=True)
        with (scratch / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a runner that was killed may need a moment to end
            call.make(Context(call))
    except StepFailed as error:
        _write_error(call, str(error))
        return EXIT_FAILED
    except Exception as error:
        traceback.print_exc()
        message = error_message(error)
        _write_error(call, message if message != str(error) else f"{type(error).__name__}: {error}")
        return EXIT_CRASHED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _write_error(call: Call, message: str) -> None:
    """Write why the step failed. Its outputs, which are incomplete, are removed first: the disk may be full."""
    shutil.rmtree(call.outputs, ignore_errors=True)
    Path(call.error).write_text(message)


def end_with_the_runner() -> None:
    """Kill this process's group once standard input is closed."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
