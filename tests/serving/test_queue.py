"""The request queue."""

import threading

import pytest

from helpers.servers import refusal_of, start_queue, wait_until
from sprint_jax.serving.queue import Queue
from sprint_jax.serving.refused import Refused


def test_first_come_first_served_and_each_gets_its_own_result(gate):
    queue = start_queue(gate)
    futures = [queue.submit(i) for i in range(5)]
    gate.open.set()
    answers = [future.result(5) for future in futures]
    assert [answer.result for answer in answers] == gate.seen == list(range(5))
    assert all(answer.waiting >= 0 and answer.working >= 0 for answer in answers)
    assert answers[4].waiting > 0


def test_a_full_queue_refuses_at_once_and_leaving_makes_room(gate):
    queue = start_queue(gate, capacity=2)
    queue.submit("at work")
    wait_until(lambda: gate.seen)
    waiting = [queue.submit(i) for i in range(2)]
    refused = refusal_of(queue.submit, "too many")
    assert refused.status == 429
    assert refused.retry_after
    assert "2 requests are waiting" in refused.sentence
    assert refusal_of(queue.check).status == 429
    assert waiting[0].cancel() and queue.length == 1
    last = queue.submit("now there is room")
    gate.open.set()
    last.result(5)
    assert gate.seen == ["at work", 1, "now there is room"]


def test_the_newest_of_a_session_takes_the_place_of_the_one_before(gate):
    queue = start_queue(gate, capacity=3)
    queue.submit("at work")
    wait_until(lambda: gate.seen)
    old, other, new = (
        queue.submit("old", "mine"),
        queue.submit("other"),
        queue.submit("new", "mine"),
    )
    queue.submit("no session")
    newest = queue.submit("newest", "mine")  # although the queue is full
    for dropped in (old, new):
        with pytest.raises(Refused, match="newer") as caught:
            dropped.result(5)
        assert caught.value.status == 409
    gate.open.set()
    newest.result(5), other.result(5)
    assert gate.seen[:3] == ["at work", "newest", "other"]


def test_an_error_goes_to_its_requester_and_the_worker_lives_on():
    queue = start_queue(lambda item: 1 // item)
    with pytest.raises(ZeroDivisionError):
        queue.submit(0).result(5)
    assert queue.submit(1).result(5).result == 1


def test_a_failing_callback_stops_nothing():
    """Serve even if `prepared` fails, as with a closed stdout."""

    def fail_to_report(error):
        """Raise an error as a closed stdout does."""
        raise BrokenPipeError("nobody reads")

    queue = Queue(lambda item: 2 * item, 4, prepared=fail_to_report)
    queue.start()
    wait_until(lambda: queue.ready)
    assert queue.submit(21, "").result(10).result == 42
    queue.close()


def test_nothing_is_served_before_it_is_prepared():
    ready, failures = threading.Event(), []

    def prepare(say):
        say(3, 8)
        ready.wait(10)

    ends = []
    queue = Queue(lambda item: item, 2, prepare, lambda error: ends.append((error, queue.ready)))
    queue.start()
    wait_until(lambda: queue.total)
    refused = refusal_of(queue.submit, 1)
    assert refused.status == 503
    assert "3 of 8" in refused.sentence
    assert refused.retry_after
    ready.set()
    wait_until(lambda: queue.ready)
    assert queue.submit(1).result(5).result == 1 and ends == [(None, True)]

    queue = Queue(lambda item: item, 2, lambda say: 1 // 0, failures.append)
    queue.start()
    wait_until(lambda: failures)
    assert isinstance(failures[0], ZeroDivisionError) and not queue.ready


def test_closing_refuses_waiting_requests(gate):
    queue = start_queue(gate)
    at_work = queue.submit(1)
    wait_until(lambda: gate.seen)
    waiting = queue.submit(2)
    queue.close()
    with pytest.raises(Refused, match="stopping"):
        waiting.result(5)
    assert refusal_of(queue.submit, 3).status == 503
    gate.open.set()
    assert at_work.result(5).result == 1
