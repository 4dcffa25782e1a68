"""The in-process feedback bus: everybody gets all, in order."""

import logging
import threading

from chainwax.connectors import InProcessBus
from chainwax.router.feedback import FeedbackBus
from chainwax.router.types import Decision, Feedback


def some(number):
    return [Feedback("node", number / 1000, call_id=str(number))]


def test_all_subscribers_get_all_in_order():
    bus: FeedbackBus = InProcessBus()
    seen = [[], []]
    for got in seen:
        bus.subscribe(got.extend)
    for number in range(500):
        bus.publish(some(number))
    bus.close()
    assert [[f.call_id for f in got] for got in seen] == [[str(number) for number in range(500)]] * 2


def test_a_subscriber_gets_what_comes_after_it():
    bus = InProcessBus()
    late = []
    bus.publish(some(1))
    bus.subscribe(late.extend)
    bus.publish(some(2))
    assert [f.call_id for f in late] == ["2"]  # delivered once publish has returned


def test_a_subscriber_that_raises_is_logged(caplog):
    bus = InProcessBus()
    got = []

    def bad(feedback):
        raise RuntimeError("broken listener")

    bus.subscribe(bad)
    bus.subscribe(got.extend)
    with caplog.at_level(logging.ERROR):
        bus.publish(some(1))
        bus.publish(some(2))
        bus.close()
    assert len(got) == 2
    assert caplog.text.count("RuntimeError: broken listener") == 2


def test_the_publishers_list_may_be_used_again():
    bus = InProcessBus()
    got = []
    bus.subscribe(got.extend)
    batch = some(1)
    bus.publish(batch)
    batch.clear()
    bus.close()
    assert len(got) == 1


def test_publishing_from_many_threads_loses_nothing():
    bus = InProcessBus()
    got = []
    bus.subscribe(got.extend)

    def work(base):
        for number in range(200):
            bus.publish(some(base + number))

    threads = [threading.Thread(target=work, args=(base * 1000,)) for base in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bus.close()
    ids = [int(f.call_id) for f in got]
    assert len(set(ids)) == 800
    for base in range(4):
        own = [number for number in ids if number // 1000 == base]
        assert own == sorted(own)


def test_decisions_are_kept_and_told():
    bus = InProcessBus(keep_decisions=3)
    told = []
    bus.announce(Decision("promoted", "n", {"number": 0}))
    bus.listen(told.append)
    for number in range(1, 5):
        bus.announce(Decision("promoted", "n", {"number": number}))
    bus.close()
    assert [d.detail["number"] for d in told] == [1, 2, 3, 4]
    assert [d.detail["number"] for d in bus.decisions] == [2, 3, 4]


def test_a_listener_may_publish():
    bus = InProcessBus()
    got = []
    done = threading.Event()

    def answer(feedback):
        got.extend(feedback)
        if len(got) < 3:
            bus.publish(some(len(got)))
        else:
            done.set()

    bus.subscribe(answer)
    bus.publish(some(0))
    assert done.wait(5)
    bus.close()
    assert len(got) == 3


def test_closed(caplog):
    bus = InProcessBus()
    got = []
    bus.subscribe(got.extend)
    bus.close()
    bus.close()
    bus.publish(some(1))
    assert not got
    assert "came too late" in caplog.text


def test_a_listener_may_close():
    bus = InProcessBus()
    closed = threading.Event()

    def close(feedback):
        bus.close()
        closed.set()

    bus.subscribe(close)
    bus.publish(some(1))
    assert closed.wait(5)
