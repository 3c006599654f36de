"""The process of one step: ``python -m splitserve.pipeline.worker call.json``.

It ends, with all that it has started, when the runner ends: its standard input is a pipe that the runner holds open.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from splitserve.pipeline.context import Call, Context, StepFailed, first_of
from splitserve.pipeline.environment import differences

EXIT_FAILED, EXIT_CRASHED = 3, 4
"""Exit codes: the step raised `StepFailed`; it raised something else. In both cases the call's ``error`` file says what."""


def main() -> int:
    call = Call(**json.loads(Path(sys.argv[1]).read_text()))
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    if differing := differences(call.locked):
        print(f"{call.step}: warning: the environment is not that of the lock: {first_of(differing)}", flush=True)
    scratch = Path(call.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a runner that was killed may need a moment to end
        try:
            call.make(Context(call))
        except StepFailed as error:
            Path(call.error).write_text(str(error))
            return EXIT_FAILED
        except Exception as error:
            traceback.print_exc()
            Path(call.error).write_text(f"{type(error).__name__}: {error}")
            return EXIT_CRASHED
    return 0


def _end_with_the_runner() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
