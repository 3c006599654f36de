"""Forked children share no connection and no lock with their parent: Celery, gunicorn with preload, multiprocessing."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature
from tests.budgets import examples
from tests.client.ways import Way

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

N_FORKS = examples(100)

PROGRAM = """
import asyncio, itertools, os, signal, sys, threading, warnings
warnings.simplefilter("ignore")
from splitserve import AsyncClient, Client

url, n_forks, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
client = Client(url, timeout_s=60)
numbers = itertools.count()
wrong = []

def ask(number):
    answer = client.infer("echo", {"x": [[number, 1]]})
    assert answer["x"].tolist() == [[number, 1]], (number, answer)

async def ask_async(number):
    async with AsyncClient(url, timeout_s=60) as other:
        answer = await other.infer("echo", {"x": [[number, 1]]})
        assert answer["x"].tolist() == [[number, 1]], (number, answer)

def work():
    while not is_over.is_set():
        try:
            ask(next(numbers))
        except BaseException as error:
            wrong.append(error)
            raise

ask(next(numbers))
is_over = threading.Event()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for n in range(n_forks):
    number = 1_000_000 + n
    child = os.fork()
    if not child:
        signal.alarm(120)  # a child that hangs is a failure
        try:
            if kind == "async":
                asyncio.run(ask_async(number))
            else:
                for part in range(4):
                    ask(number + part / 4)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        if n % 10:
            os._exit(0)
        sys.exit(0)
    for _ in range(4):  # on the connection that was idle when the process was forked
        ask(next(numbers))
    _, status = os.waitpid(child, 0)
    if status:
        wrong.append(f"child {n}: status {status}")
        break
is_over.set()
for thread in threads:
    thread.join()
client.close()
assert not wrong, wrong
"""


@pytest.mark.parametrize("kind", ["blocking", "async"])
@pytest.mark.parametrize("is_rest", [True, False], ids=["rest", "grpc"])
async def test_a_child_gets_its_own_answers_while_the_parent_calls(is_rest: bool, kind: str) -> None:
    """The parent's threads are in the middle of calls when it forks; each child ends by itself."""
    service = FakeInference(signature("echo", [TensorSpec("x", "FP64", ("batch", 2))]))

    async with Way(is_rest, is_async=False).serving(service) as url:
        n_forks = N_FORKS if kind == "blocking" else 10
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, url, str(n_forks), kind, stderr=asyncio.subprocess.PIPE
        )
        _, errors = await process.communicate()

    assert process.returncode == 0, errors.decode()
