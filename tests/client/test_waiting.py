"""Waiting for the end of a job, without a server and without time passing."""

from __future__ import annotations

from typing import Any

import pytest

from splitserve.client.inference import Core
from splitserve.client.jobs import LEAST_INTERVAL_S, POLL_S, wait
from splitserve.client.retries import Failed
from splitserve.client.steps import Send, run
from splitserve.errors import DeadlineExceeded, NotFound, SplitserveError, Unavailable
from splitserve.jobs.records import Job

RUNNING = Job(id="1", owner="", status="running", model="m", version="1.1", priority=5, created=1.0)
ENDED = Job(id="1", owner="", status="succeeded", model="m", version="1.1", priority=5, created=1.0)
TIMEOUT_S = 30.0


class World:
    """A clock, and a server that answers as scripted: at once, or after the time that it was asked to wait; the last for ever."""

    def __init__(self, *answers: Job | SplitserveError, is_patient: bool = False) -> None:
        self.now = 100.0
        self.asked_at: list[float] = []
        self._answers = list(answers)
        self._is_patient = is_patient

    def send(self, step: Send) -> Any:
        self.asked_at.append(self.now)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, SplitserveError):
            raise Failed(answer, can_retry=True)
        if self._is_patient and not answer.is_finished:
            self.now += step.ask.job.wait_s
        return answer

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, timeout_s: float | None = None) -> Job:
        core = Core(TIMEOUT_S, max_attempts=1, clock=lambda: self.now)
        return run(wait(core, RUNNING, timeout_s), self.send, self.sleep)


def test_a_server_that_answers_at_once_is_not_asked_again_at_once() -> None:
    """It is stopping, or too many wait there already."""
    world = World(RUNNING, RUNNING, RUNNING, ENDED)

    assert world.wait() is ENDED
    assert world.asked_at == [100.0 + n * LEAST_INTERVAL_S for n in range(4)]


def test_a_server_that_waits_is_asked_again_without_a_pause() -> None:
    """So that an end is seen when it happens."""
    world = World(RUNNING, RUNNING, ENDED, is_patient=True)

    assert world.wait() is ENDED
    assert world.asked_at == [100.0, 100.0 + POLL_S, 100.0 + 2 * POLL_S]


def test_a_server_that_restarts_does_not_end_the_waiting() -> None:
    """The job is on disk. What counts is how long the server has been away, not how long the job takes."""
    away = [Unavailable("the server cannot be reached")] * 20
    world = World(*away, RUNNING, *away, ENDED)

    assert world.wait() is ENDED


@pytest.mark.parametrize("error", [Unavailable("the server cannot be reached"), NotFound("there is no job")])
def test_a_server_that_stays_away_and_a_job_that_is_gone_end_the_waiting(error: SplitserveError) -> None:
    """With that error; the former once a request would have ended too."""
    world = World(error)

    with pytest.raises(type(error)):
        world.wait()
    assert world.now <= 100.0 + TIMEOUT_S


@pytest.mark.parametrize("is_patient", [False, True])
def test_a_timeout_ends_the_waiting_in_time(is_patient: bool) -> None:
    """However the server answers."""
    world = World(RUNNING, is_patient=is_patient)

    with pytest.raises(DeadlineExceeded, match=r"is still running after 2\.5 s"):
        world.wait(2.5)
    assert world.now == pytest.approx(102.5)
