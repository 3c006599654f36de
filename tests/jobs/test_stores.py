"""What every job store does (`splitserve.jobs.store`). A lease, delay or time to live of 0 is over at once: no test waits."""

from __future__ import annotations

import asyncio

import pytest

from splitserve.errors import Gone, IdempotencyKeyReused, Internal, InvalidInput, Unavailable
from splitserve.jobs.records import (
    DeliveryAttempt,
    DeliveryState,
    Finish,
    Job,
    JobError,
    Lease,
    NewJob,
    Payload,
    Retry,
    Rights,
    Webhook,
    new_id,
)

HOUR = 3600.0
UNAVAILABLE = JobError.of(Unavailable("preprocess cannot be reached", stage="proxy"))


def job(**options: object) -> NewJob:
    defaults = {"owner": "ann", "model": "penguins", "version": "1.1", "request": Payload(b"rows")}
    return NewJob(id=new_id(), **{**defaults, **options})


async def submitted(store, **options: object) -> Job:
    return (await store.submit(job(**options))).job


async def claim_one(store, worker: str = "w1", lease_s: float = HOUR):
    (claimed,) = await store.claim(worker, 1, lease_s)
    return claimed


async def status_of(store, found: Job) -> str:
    return (await store.get(found.owner, found.id)).status


# Submitting


async def test_a_submitted_job_can_be_read_with_all_that_was_given(open_store):
    """What a caller submits is what is stored."""
    store = await open_store()
    webhook = Webhook("https://example.org/hook", ("job.failed",))

    found = await submitted(store, priority=2, timeout_s=7.0, expires_s=60.0, webhook=webhook)

    assert (found.status, found.model, found.version, found.priority) == ("queued", "penguins", "1.1", 2)
    assert (found.timeout_s, found.webhook, found.attempt) == (7.0, webhook, 0)
    assert found.expires - found.created == pytest.approx(60.0, abs=1e-3)
    assert await store.get("ann", found.id) == found


async def test_a_job_is_still_there_when_the_store_is_opened_again(open_store):
    """What a call has returned is on disk."""
    store = await open_store()
    found = await submitted(store, rendering=b"as JSON")

    again = await open_store()

    assert await again.get("ann", found.id) == found
    claimed = await claim_one(again)
    assert (claimed.request, claimed.owner, claimed.rights) == (Payload(b"rows"), "ann", Rights())


async def test_a_job_belongs_to_who_submitted_it(open_store):
    """To anyone else it does not exist."""
    store = await open_store()
    found = await submitted(store)

    assert await store.get("bob", found.id) is None
    assert await store.result("bob", found.id) is None
    assert await store.delete("bob", found.id) is None
    assert await store.list_jobs("bob") == []
    assert await status_of(store, found) == "queued"


# Idempotency keys


async def test_a_key_with_the_same_request_gives_the_same_job(open_store):
    """A caller that did not get the answer sends the request again."""
    store = await open_store()
    first = await store.submit(job(key="k", fingerprint=b"1"))

    second = await store.submit(job(key="k", fingerprint=b"1"))

    assert first.is_new
    assert not second.is_new
    assert second.job == first.job
    assert len(await store.list_jobs("ann")) == 1


async def test_a_key_with_another_request_is_refused(open_store):
    """It is an error of the caller, and no job is stored."""
    store = await open_store()
    await submitted(store, key="k", fingerprint=b"1")

    with pytest.raises(IdempotencyKeyReused):
        await store.submit(job(key="k", fingerprint=b"2"))

    assert len(await store.list_jobs("ann")) == 1


async def test_a_key_belongs_to_its_caller(open_store):
    """Two callers may choose the same key."""
    store = await open_store()
    first = await submitted(store, key="k", fingerprint=b"1")

    second = await submitted(store, owner="bob", key="k", fingerprint=b"2")

    assert first.id != second.id


async def test_a_key_whose_job_was_removed_says_gone(open_store):
    """Until the key's time is over: the work was done, and must not be done again."""
    store = await open_store()
    found = await submitted(store, key="k", fingerprint=b"1")
    await store.delete("ann", found.id)
    await store.delete("ann", found.id)

    with pytest.raises(Gone):
        await store.submit(job(key="k", fingerprint=b"1"))


async def test_the_job_of_a_key_is_found(open_store):
    """Without a submit; as a submit would find it."""
    store = await open_store()
    stored = (await store.submit(job(key="k", fingerprint=b"1"))).job

    assert await store.job_of_key("ann", "k", b"1") == stored
    assert await store.job_of_key("ann", "other", b"1") is None
    assert await store.job_of_key("bob", "k", b"1") is None
    with pytest.raises(IdempotencyKeyReused):
        await store.job_of_key("ann", "k", b"2")
    for _ in range(2):
        await store.delete("ann", stored.id)
    with pytest.raises(Gone):
        await store.job_of_key("ann", "k", b"1")


async def test_a_key_whose_time_is_over_is_free(open_store):
    """Also if the sweep has not come by yet."""
    store = await open_store(key_ttl_s=0)
    first = await submitted(store, key="k", fingerprint=b"1")

    second = await submitted(store, key="k", fingerprint=b"2")
    await store.sweep()

    assert first.id != second.id


async def test_a_key_sent_many_times_at_once_makes_one_job(open_store):
    """All get the same job, and none an error."""
    store = await open_store()

    answers = await asyncio.gather(*[store.submit(job(key="k", fingerprint=b"1")) for _ in range(64)])

    assert len({answer.job.id for answer in answers}) == 1
    assert sum(answer.is_new for answer in answers) == 1
    assert len(await store.list_jobs("ann")) == 1


# Claiming


async def test_a_claim_takes_by_priority_and_then_by_age(open_store):
    """A smaller number is claimed first."""
    store = await open_store()
    found = [await submitted(store, priority=priority) for priority in (5, 9, 1, 5)]

    claimed = [await claim_one(store) for _ in found]

    assert [each.lease.id for each in claimed] == [found[index].id for index in (2, 0, 3, 1)]


async def test_the_oldest_job_has_a_share_of_each_claim(open_store):
    """However many jobs of higher priority there are, the oldest one starves no longer than until the next claim of several."""
    store = await open_store()
    oldest = await submitted(store, priority=9)
    for _ in range(8):
        await submitted(store, priority=1)

    claimed = await store.claim("w1", 2, HOUR)

    assert oldest.id in [each.lease.id for each in claimed]
    assert len(claimed) == 2


async def test_a_job_is_claimed_once(open_store):
    """Many workers claim at once; no job is given to two of them, and no claim takes more than asked for."""
    store = await open_store()
    found = [await submitted(store) for _ in range(40)]

    claims = await asyncio.gather(*[store.claim(f"w{number}", 7, HOUR) for number in range(12)])

    ids = [each.lease.id for claimed in claims for each in claimed]
    assert sorted(ids) == sorted(each.id for each in found)
    assert max(map(len, claims)) <= 7


async def test_the_attempt_is_counted_in_the_claim(open_store):
    """A job that kills its worker would otherwise never be counted."""
    store = await open_store()
    found = await submitted(store)

    claimed = await claim_one(store)

    now = await store.get("ann", found.id)
    assert (claimed.attempt, now.attempt, now.status) == (1, 1, "running")
    assert now.started >= now.created


async def test_an_orphan_is_claimed_again(open_store):
    """Its worker is gone, and its lease is over."""
    store = await open_store()
    await submitted(store)
    first = await claim_one(store, "w1", lease_s=0)

    second = await claim_one(store, "w2")

    assert second.lease.id == first.lease.id
    assert second.lease.fence > first.lease.fence
    assert second.attempt == 2


async def test_a_worker_gives_back_what_it_does_not_know(open_store):
    """The answer to its claim was lost: the jobs are not kept, nor do they lose an attempt. Other workers' are untouched."""
    store = await open_store()
    for _ in range(3):
        await store.submit(job())
    known, lost = await store.claim("a", 2, HOUR)
    (other,) = await store.claim("b", 1, HOUR)

    n_given_back = await store.give_back_all_but("a", [known.lease])
    (again,) = await store.claim("a", 3, HOUR)

    assert n_given_back == 1
    assert (again.lease.id, again.attempt) == (lost.lease.id, 1)
    assert again.lease.fence > lost.lease.fence
    assert await store.renew("a", [known.lease, again.lease], HOUR) == []
    assert await store.renew("b", [other.lease], HOUR) == []
    assert await store.give_back_all_but("b", []) == 1


async def test_a_leased_job_is_not_claimed_again(open_store):
    """However long it runs, as long as its worker renews the lease."""
    store = await open_store()
    await submitted(store)
    claimed = await claim_one(store, "w1", lease_s=HOUR)

    lost = await store.renew("w1", [claimed.lease], HOUR)

    assert lost == []
    assert await store.claim("w2", 1, HOUR) == []


async def test_a_job_that_kills_its_workers_ends_as_failed(open_store):
    """After exactly as many attempts as are allowed, and the reason says so."""
    store = await open_store(max_attempts=3)
    found = await submitted(store)
    n_claims = 0
    while await store.claim(f"w{n_claims}", 1, 0):
        n_claims += 1

    now = await store.get("ann", found.id)

    assert n_claims == 3
    assert (now.status, now.attempt) == ("failed", 3)
    assert "the worker died 3 times" in now.error.message


# Ending


async def test_a_finished_job_has_its_answer(open_store):
    """And the times of its life, in order."""
    store = await open_store()
    found = await submitted(store, rendering=b"as JSON")
    claimed = await claim_one(store)

    assert await store.finish([Finish(claimed.lease, Payload(b"answer"))]) == [True]

    result = await store.result("ann", found.id)
    assert (result.job.status, result.answer, result.rendering) == ("succeeded", Payload(b"answer"), b"as JSON")
    assert result.job.created <= result.job.started <= result.job.finished < result.job.remove_at


async def test_a_failed_job_has_its_error(open_store):
    """With class, message and stage, as the caller of a plain inference would have got it."""
    store = await open_store()
    found = await submitted(store)
    claimed = await claim_one(store)
    error = InvalidInput("row 3 is bad", stage="preprocess", model="penguins", pair="1.1")

    await store.finish([Finish(claimed.lease, error=JobError.of(error))])

    now = await store.get("ann", found.id)
    assert now.status == "failed"
    assert type(now.error.to_error()) is InvalidInput
    assert now.error.to_error().metadata == error.metadata


async def test_a_worker_that_comes_back_late_cannot_overwrite(open_store):
    """Its job was claimed by another one: neither its answer, nor its retry, nor its lease counts."""
    store = await open_store()
    found = await submitted(store)
    late = await claim_one(store, "w1", lease_s=0)
    newest = await claim_one(store, "w2")

    assert await store.renew("w1", [late.lease], HOUR) == [late.lease]
    assert await store.finish([Finish(late.lease, Payload(b"late"))]) == [False]
    assert await store.retry([Retry(late.lease)]) == [False]
    assert await store.finish([Finish(newest.lease, Payload(b"newest"))]) == [True]
    assert await store.finish([Finish(late.lease, Payload(b"late"))]) == [False]

    assert (await store.result("ann", found.id)).answer == Payload(b"newest")


async def test_a_fence_is_never_used_twice_although_attempts_are_given_back(open_store):
    """Otherwise the write of an earlier claim would pass for that of a later one."""
    store = await open_store()
    await submitted(store)
    first = await claim_one(store)
    await store.retry([Retry(first.lease)])

    second = await claim_one(store)

    assert (first.attempt, second.attempt) == (1, 1)
    assert await store.finish([Finish(first.lease, Payload(b"late"))]) == [False]
    assert second.lease.fence > first.lease.fence


async def test_one_late_write_among_others_does_not_stop_them(open_store):
    """Workers write several jobs at once."""
    store = await open_store()
    for _ in range(2):
        await submitted(store)
    first, second = await store.claim("w1", 2, HOUR)

    written = await store.finish([Finish(Lease(first.lease.id, 99), Payload(b"x")), Finish(second.lease, Payload(b"y"))])

    assert written == [False, True]


# Retries


async def test_an_attempt_that_is_given_back_does_not_count(open_store):
    """Drain, 429 and an unreachable proxy are not the job's fault: it can be rolled over any number of times."""
    store = await open_store(max_attempts=2)
    found = await submitted(store)

    for _ in range(5):
        claimed = await claim_one(store)
        await store.retry([Retry(claimed.lease)])

    now = await store.get("ann", found.id)
    assert (now.status, now.attempt) == ("queued", 0)


async def test_a_failed_attempt_counts_until_none_is_left(open_store):
    """Then the job ends with the reason of the last one."""
    store = await open_store(max_attempts=2)
    found = await submitted(store)

    for _ in range(2):
        claimed = await claim_one(store)
        await store.retry([Retry(claimed.lease, error=UNAVAILABLE)])

    now = await store.get("ann", found.id)
    assert (now.status, now.attempt) == ("failed", 2)
    assert now.error.message == "preprocess cannot be reached (attempt 2 of 2)"
    assert await store.claim("w1", 1, HOUR) == []


async def test_a_job_that_waits_for_its_next_attempt_holds_up_no_other(open_store):
    """It is passed over until its delay is over."""
    store = await open_store()
    await submitted(store, priority=1)
    poisoned = await claim_one(store)
    await store.retry([Retry(poisoned.lease, HOUR, UNAVAILABLE)])
    other = await submitted(store)

    claimed = await store.claim("w1", 5, HOUR)

    assert [each.lease.id for each in claimed] == [other.id]


# Cancelling and removing


async def test_a_cancelled_job_is_never_run(open_store):
    """Cancelling is a change of the row: it holds without a worker, and after a restart."""
    store = await open_store()
    found = await submitted(store)

    cancelled, _ = await store.delete("ann", found.id)
    again = await open_store()

    assert cancelled.status == "cancelled"
    assert await again.claim("w1", 1, HOUR) == []
    assert await status_of(again, found) == "cancelled"


async def test_a_running_job_that_is_cancelled_stays_cancelled(open_store):
    """Its worker learns of it when it renews, and what it writes is refused."""
    store = await open_store()
    found = await submitted(store)
    claimed = await claim_one(store)

    await store.delete("ann", found.id)

    assert await store.renew("w1", [claimed.lease], HOUR) == [claimed.lease]
    assert await store.finish([Finish(claimed.lease, Payload(b"answer"))]) == [False]
    assert await status_of(store, found) == "cancelled"


async def test_deleting_a_job_that_has_ended_removes_it(open_store):
    """The answer says in which state it was."""
    store = await open_store()
    found = await submitted(store)
    claimed = await claim_one(store)
    await store.finish([Finish(claimed.lease, Payload(ref="answer-file"))])

    removed, freed = await store.delete("ann", found.id)

    assert removed.status == "succeeded"
    assert freed == ["answer-file"]
    assert await store.get("ann", found.id) is None


async def test_a_cancel_keeps_a_job_that_has_ended(open_store):
    """It may have ended just before, or by the same cancel, whose answer was lost."""
    store = await open_store()
    done, cancelled = [(await store.submit(job())).job for _ in range(2)]
    (claimed,) = [each for each in await store.claim("w1", 2, HOUR) if each.lease.id == done.id]
    await store.finish([Finish(claimed.lease, Payload(b"answer"))])

    for _ in range(2):
        assert (await store.delete("ann", done.id, keep_ended=True))[0].status == "succeeded"
        assert (await store.delete("ann", cancelled.id, keep_ended=True))[0].status == "cancelled"

    assert (await store.result("ann", done.id)).answer.data == b"answer"


async def test_what_cancel_answers_is_what_holds(open_store):
    """Cancel and the end of a job race: the first final state stays, and both sides are told the truth."""
    store = await open_store()
    found = [await submitted(store) for _ in range(50)]
    claimed = {each.lease.id: each for each in await store.claim("w1", 50, HOUR)}

    for each in found:
        calls = [store.finish([Finish(claimed[each.id].lease, Payload(b"answer"))]), store.delete("ann", each.id)]
        if int(each.id, 16) % 2:
            (is_written,), (answered, _) = await asyncio.gather(*calls)
        else:
            (answered, _), (is_written,) = await asyncio.gather(*reversed(calls))
        now = await store.get("ann", each.id)
        if is_written:
            assert answered.status == "succeeded"
            assert now is None  # it had ended, so that it was removed
        else:
            assert answered.status == now.status == "cancelled"


# Time


async def test_a_job_expires_in_the_queue(open_store):
    """It is not claimed any more, and the sweep ends it with the reason."""
    store = await open_store()
    found = await submitted(store, expires_s=1e-6)

    assert await store.claim("w1", 1, HOUR) == []
    swept = await store.sweep()

    now = await store.get("ann", found.id)
    assert swept.ended == [found.id]
    assert (now.status, now.error.message) == ("failed", "the job expired in the queue")
    assert now.error.to_error().http_status == 504


async def test_a_job_is_removed_when_its_time_to_live_is_over(open_store):
    """With its payloads; active jobs stay."""
    store = await open_store(ttl_s=0)
    found = await submitted(store)
    claimed = await claim_one(store)
    active = await submitted(store)
    await store.finish([Finish(claimed.lease, Payload(ref="answer-file"))])

    swept = await store.sweep()

    assert swept.freed == ["answer-file"]
    assert swept.is_complete
    assert await store.get("ann", found.id) is None
    assert await status_of(store, active) == "queued"


async def test_a_job_that_has_ended_is_never_changed_by_others(open_store):
    """Neither a sweep nor a claim makes a failure of a success."""
    store = await open_store(max_attempts=1)
    found = await submitted(store, expires_s=HOUR)
    claimed = await claim_one(store, lease_s=0)
    await store.finish([Finish(claimed.lease, Payload(b"answer"))])

    assert await store.claim("w2", 5, HOUR) == []
    await store.sweep()

    assert await status_of(store, found) == "succeeded"


# Lists and counts


async def test_lists_are_newest_first_in_pages(open_store):
    """``after`` is the last job of the page before."""
    store = await open_store()
    found = [await submitted(store) for _ in range(5)]

    first = await store.list_jobs("ann", limit=3)
    second = await store.list_jobs("ann", limit=3, after=first[-1].id)

    assert [each.id for each in (*first, *second)] == [each.id for each in reversed(found)]
    assert await store.list_jobs("ann", after=new_id()) == []


async def test_lists_can_be_filtered(open_store):
    """By model and by status."""
    store = await open_store()
    await submitted(store)
    digits = await submitted(store, model="digits")
    await store.delete("ann", digits.id)

    assert [each.id for each in await store.list_jobs("ann", model="digits")] == [digits.id]
    assert [each.id for each in await store.list_jobs("ann", status="cancelled")] == [digits.id]
    assert await store.list_jobs("ann", model="digits", status="queued") == []


async def test_counts_follow_every_change_of_state(open_store):
    """They are kept with each change, not counted by a scan."""
    store = await open_store(ttl_s=0)
    for owner in ("ann", "ann", "ann", "bob"):
        await submitted(store, owner=owner)
    claimed = await store.claim("w1", 3, HOUR)
    await store.finish([Finish(claimed[0].lease, Payload(b"x"))])
    await store.retry([Retry(claimed[1].lease, HOUR)])

    state = await store.state()
    await store.sweep()
    after = await store.state()

    assert {status: state.n(status) for status in ("queued", "running", "succeeded")} == {
        "queued": 2,
        "running": 1,
        "succeeded": 1,
    }
    assert state.oldest_queued_s >= 0
    assert (after.n("succeeded"), after.n("queued", "running")) == (0, 3)
    assert sum(tally.n for tally in after.tallies if tally.owner == "bob") == 1


async def test_finished_jobs_are_found_among_others(open_store):
    """What callers who wait are woken by; a job that is gone has ended too."""
    store = await open_store()
    queued, cancelled = await submitted(store), await submitted(store)
    await store.delete("ann", cancelled.id)
    gone = new_id()

    assert set(await store.finished_among([queued.id, cancelled.id, gone])) == {cancelled.id, gone}


async def test_payloads_of_jobs_are_known(open_store):
    """So that files without a job can be told from others."""
    store = await open_store()
    await submitted(store, request=Payload(ref="request-file"))

    assert await store.known_refs(["request-file", "stray-file", ""]) == ["request-file"]


# The outbox

HOOK = Webhook("https://Example.org:8443/hook")


async def ended(store, webhook: Webhook = HOOK) -> Job:
    found = await submitted(store, webhook=webhook)
    claimed = await claim_one(store)
    await store.finish([Finish(claimed.lease, Payload(b"answer"))])
    return found


async def test_the_end_of_a_job_is_in_the_outbox(open_store):
    """Written in the same transaction, with an id that follows from job and event."""
    store = await open_store()
    found = await ended(store)

    delivery = await store.claim_delivery(HOUR, [])

    assert delivery.id == f"msg_{found.id}_succeeded"
    assert (delivery.url, delivery.job, delivery.attempt) == (HOOK.url, found.id, 1)
    assert b'"type":"job.succeeded"' in delivery.body
    assert b"answer" not in delivery.body
    assert (await store.get("ann", found.id)).delivery.status == "pending"
    assert (await store.state()).outbox == 1


async def test_only_the_events_that_were_chosen_are_sent(open_store):
    """A job that succeeds sends nothing to a receiver of failures."""
    store = await open_store()

    await ended(store, Webhook(HOOK.url, ("job.failed",)))

    assert await store.claim_delivery(HOUR, []) is None


@pytest.mark.parametrize("end", ["cancel", "expire", "die"])
async def test_every_end_of_a_job_sends_its_event(open_store, end):
    """Not only the ends that a worker writes."""
    store = await open_store(max_attempts=1)
    found = await submitted(store, webhook=HOOK, expires_s=1e-6 if end == "expire" else 0)
    if end == "cancel":
        await store.delete("ann", found.id)
    elif end == "expire":
        await store.sweep()
    else:
        await store.claim("w1", 1, 0)
        await store.claim("w2", 1, 0)

    delivery = await store.claim_delivery(HOUR, [])

    assert delivery.id == f"msg_{found.id}_{'cancelled' if end == 'cancel' else 'failed'}"


async def test_a_delivery_is_claimed_once_and_not_for_busy_hosts(open_store):
    """One receiver that is slow holds up only its own."""
    store = await open_store()
    await ended(store)

    assert await store.claim_delivery(HOUR, ["example.org"]) is None
    assert await store.claim_delivery(HOUR, ["other.org"]) is not None
    assert await store.claim_delivery(HOUR, []) is None


async def test_a_delivery_is_tried_again_after_its_delay(open_store):
    """And is seen in the job."""
    store = await open_store()
    found = await ended(store)
    first = await store.claim_delivery(HOUR, [])
    await store.finish_delivery(DeliveryAttempt(first.id, DeliveryState("pending", first.attempt, 500, "oops"), retry_s=0))

    second = await store.claim_delivery(HOUR, [])
    await store.finish_delivery(DeliveryAttempt(second.id, DeliveryState("delivered", second.attempt, 204)))

    seen = (await store.get("ann", found.id)).delivery
    assert (second.attempt, second.body) == (2, first.body)
    assert (seen.status, seen.attempt, seen.http_status) == ("delivered", 2, 204)
    assert await store.claim_delivery(HOUR, []) is None
    assert (await store.state()).outbox == 0


async def test_a_late_attempt_to_deliver_does_not_count(open_store):
    """Its lease was over, and another one has begun."""
    store = await open_store()
    await ended(store)
    late = await store.claim_delivery(0, [])
    newest = await store.claim_delivery(HOUR, [])

    await store.finish_delivery(DeliveryAttempt(late.id, DeliveryState("failed", late.attempt)))

    assert (await store.state()).outbox == 1
    await store.finish_delivery(DeliveryAttempt(newest.id, DeliveryState("delivered", newest.attempt)))
    assert (await store.state()).outbox == 0


async def test_an_internal_error_keeps_its_class(open_store):
    """Reasons cross the store as they cross a hop."""
    store = await open_store()
    found = await submitted(store)
    claimed = await claim_one(store)
    await store.finish([Finish(claimed.lease, error=JobError.of(Internal("internal error", stage="predict")))])

    assert type((await store.get("ann", found.id)).error.to_error()) is Internal
