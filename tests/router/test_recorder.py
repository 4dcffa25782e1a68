import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainwax.router.errors import BackendDown
from chainwax.router.recorder import LLMInterfaceRecorder, LLMRecorder, wilson
from chainwax.router.types import Arm, Attempt, CallResult, Usage


class Clock:
    """Monotonic and time of day differ, so that one is never taken for the other."""

    def __init__(self):
        self.now = 50.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now + 1e9

    async def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def attempt(latency=0.1, **fields):
    fields = {"usage": Usage(10, 2, 1), "cost_usd": 0.5, "text": "t", **fields}
    return Attempt("c", 1, Arm("m"), latency_s=latency, **fields)


def counts(snapshot, key="attempts"):
    return [snapshot[window][key] for window in ("minute", "hour", "uptime")]


def test_a_counted_run(clock):
    recorder = LLMRecorder(clock)
    for latency in (0.1, 0.2, 0.3, 0.4):
        recorder.record(attempt(latency, first_token_s=latency / 10, simulated=latency < 0.25))
    recorder.record(
        attempt(9.0, error="BackendDown: http://x:1 is gone", text=None, cost_usd=0.0, usage=Usage())
    )
    recorder.record(attempt(0.5, error="AnswerInvalid: no", invalid=True))
    recorder.record(attempt(0.5, reused=True))
    for score in (1.0, 1.0, 0.0, 2.0, -1.0, float("nan")):  # the last is no score, those before are cut
        recorder.score(score)
    clock.now += 2

    snapshot = recorder.snapshot()

    assert json.loads(json.dumps(snapshot)) == snapshot
    assert snapshot.keys() == {"minute", "hour", "uptime"}
    for name in ("latency_s", "first_token_s"):
        buckets = snapshot["uptime"][name].pop("buckets")
        assert list(buckets.values())[-1] == snapshot["uptime"][name]["count"]
    assert snapshot["minute"] == snapshot["hour"] == snapshot["uptime"]
    minute = snapshot["minute"]
    latency, first = minute.pop("latency_s"), minute.pop("first_token_s")
    low, high = wilson(3, 5)
    assert minute == {
        "seconds": 2.0, "attempts": 6, "reused": 1, "simulated": 2, "errors": 2,
        "errors_by_class": {"BackendDown": 1, "AnswerInvalid": 1}, "validation_failures": 1,
        "input_tokens": 50, "output_tokens": 10, "cached_tokens": 5, "cost_usd": 2.5,
        "scores": 5, "score": 0.6, "score_low": low, "score_high": high,
    }  # fmt: skip
    # Five attempts brought an answer; the failed one's nine seconds are not its model's latency.
    assert latency["p50"] == pytest.approx(0.3, rel=0.011)
    assert latency["p99"] == pytest.approx(0.4, rel=0.011)  # of five values the fourth is below rank 3.96
    assert latency["mean"] == pytest.approx(0.3)
    assert first["p50"] == pytest.approx(0.02, rel=0.011)


def test_nothing_recorded_is_no_error(clock):
    snapshot = LLMRecorder(clock).snapshot()
    assert snapshot["minute"]["latency_s"] == {"count": 0, "sum": 0} | dict.fromkeys(
        ("mean", "p50", "p90", "p95", "p99")
    )
    assert snapshot["uptime"]["score"] is None
    assert (snapshot["uptime"]["score_low"], snapshot["uptime"]["score_high"]) == (0.0, 1.0)
    assert json.dumps(LLMInterfaceRecorder(clock).snapshot())


def test_windows_forget_and_the_uptime_does_not(clock):
    recorder = LLMRecorder(clock)
    recorder.record(attempt())
    clock.now += 54.9
    recorder.record(attempt())
    assert counts(recorder.snapshot()) == [2, 2, 2]
    clock.now += 5.2  # 60.1 s: the first is past the last minute
    assert counts(recorder.snapshot()) == [1, 2, 2]
    clock.now += 3_480
    recorder.record(attempt())
    assert counts(recorder.snapshot()) == [1, 3, 3]
    clock.now += 60  # the first two are past the last hour
    assert counts(recorder.snapshot()) == [0, 1, 3]
    clock.now += 100 * 3600
    assert counts(recorder.snapshot()) == [0, 0, 3]
    recorder.record(attempt())
    assert counts(recorder.snapshot()) == [1, 1, 4]
    assert recorder.snapshot()["uptime"]["seconds"] == pytest.approx(clock.now - 50.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 8) | st.floats(0, 4000), st.booleans()), min_size=1, max_size=80))
def test_each_window_counts_what_fell_into_it_whatever_the_gaps(gaps):
    clock = Clock()
    recorder = LLMRecorder(clock)
    times = []
    for gap, read in gaps:
        clock.now += gap
        times.append(clock.now)
        recorder.record(attempt())
        if read:  # what was reckoned for it is used again
            recorder.snapshot()
    snapshot = recorder.snapshot()
    assert snapshot["uptime"]["attempts"] == len(times)
    for window, longest, finest in (("minute", 60, 5), ("hour", 3600, 60)):
        seconds, n = snapshot[window]["seconds"], snapshot[window]["attempts"]
        assert min(longest - finest, clock.now - 50.0) <= seconds + 1e-6
        assert seconds <= longest
        start = clock.now - seconds
        assert sum(t > start + 1e-6 for t in times) <= n <= sum(t >= start - 1e-6 for t in times)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.2, 3.0))
def test_quantiles_are_within_the_sketchs_accuracy_over_many_slots(seed, spread):
    clock = Clock()
    recorder = LLMRecorder(clock)
    latencies = np.random.default_rng(seed).lognormal(-2, spread, 1500)
    for latency in latencies:
        recorder.record(attempt(float(latency), first_token_s=float(latency) / 2))
        clock.now += 2.0  # 3000 s: all within the hour
    report = recorder.snapshot()["hour"]
    for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        exact = np.quantile(latencies, quantile, method="lower")
        assert report["latency_s"][name] == pytest.approx(exact, rel=0.0101)
        assert report["first_token_s"][name] == pytest.approx(exact / 2, rel=0.0101)


def test_durations_that_are_no_numbers_are_passed_over(clock):
    recorder = LLMRecorder(clock)
    for latency in (float("nan"), float("inf"), -1.0, 1e300, 0.0, 5e-324, 1.0):
        recorder.record(attempt(latency))
    snapshot = recorder.snapshot()["uptime"]
    assert snapshot["attempts"] == 7
    assert snapshot["latency_s"]["p99"] == pytest.approx(0.0, abs=1e-9)
    assert snapshot["latency_s"]["mean"] == pytest.approx(1 / 3)


def test_a_server_that_makes_up_errors_does_not_take_the_memory(clock):
    recorder, interface = LLMRecorder(clock), LLMInterfaceRecorder(clock)
    for i in range(1000):
        recorder.record(attempt(error=f"Odd{i}: x", text=None))
        interface.chosen(f"arm{i}")
        clock.now += 1
    by_class = recorder.snapshot()["uptime"]["errors_by_class"]
    choices = interface.snapshot()["uptime"]["choices"]
    for named in (by_class, choices):
        assert len(named) == 201
        assert sum(named.values()) == 1000
        assert named["other"] == 800


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its memory from /proc")
def test_memory_is_flat_over_200_000_records(clock):
    recorder, interface = LLMRecorder(clock), LLMInterfaceRecorder(clock)
    result = CallResult("c", "n", waited_s=0.2)

    def record(times):
        for i in range(times):
            recorder.record(attempt(0.01 + (i * 7919 % 1000) / 100, first_token_s=0.01))
            recorder.score(1.0)
            interface.submitted()
            interface.chosen("m")
            interface.finished(result)
            clock.now += 0.05

    record(80_000)  # over an hour: all slots are in use
    before = resident_mb()
    record(200_000)
    # 30 bytes a record: less than keeping one takes, and more than the noise of a large process.
    assert resident_mb() - before < 6.0
    assert recorder.snapshot()["uptime"]["attempts"] == 280_000


def test_an_interface_counts_its_queries(clock):
    recorder = LLMInterfaceRecorder(clock)
    recorder.submitted(4)
    recorder.submitted()
    for arm in ("small", "small", "big"):
        recorder.chosen(arm)
    recorder.finished(CallResult("c1", "team", "a", waited_s=0.1))
    recorder.finished(CallResult("c2", "team", "a", waited_s=0.3, reused=True))
    clock.now += 10
    recorder.finished(CallResult("c3", "team", error=BackendDown("gone"), waited_s=0.2))

    snapshot = recorder.snapshot()

    assert json.loads(json.dumps(snapshot)) == snapshot
    assert snapshot["in_flight"] == 2
    assert snapshot["rate_per_s"] == 0.5
    assert snapshot["last_error"] == {
        "error": "BackendDown", "message": "gone", "node": "team", "time": clock.time(),
    }  # fmt: skip
    minute = snapshot["minute"]
    assert minute["waited_s"]["p50"] == pytest.approx(0.2, rel=0.011)
    del minute["waited_s"]
    assert minute == {
        "seconds": 10.0, "queries": 5, "finished": 3, "errors": 1, "reused": 1,
        "choices": {"small": 2, "big": 1},
    }  # fmt: skip

    clock.now += 7200
    snapshot = recorder.snapshot()
    assert counts(snapshot, "queries") == [0, 0, 5]
    assert (snapshot["in_flight"], snapshot["rate_per_s"]) == (2, 0.0)
    assert snapshot["last_error"]["message"] == "gone"


def test_the_rate_is_that_of_the_last_minute(clock):
    recorder = LLMInterfaceRecorder(clock)
    recorder.submitted(3)
    assert recorder.snapshot()["rate_per_s"] == 3.0  # of the first moment, not infinite
    for _ in range(200):
        clock.now += 1
        recorder.submitted(4)
    assert recorder.snapshot()["rate_per_s"] == pytest.approx(4.0, rel=0.05)


def test_snapshots_from_another_thread_are_whole(clock):
    recorder = LLMInterfaceRecorder(clock)
    stop = threading.Event()
    broken = []

    def read():
        while not stop.is_set():
            snapshot = recorder.snapshot()["uptime"]
            if not 0 <= snapshot["queries"] - snapshot["finished"] <= 1:
                broken.append(snapshot)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20_000):
        recorder.submitted()
        recorder.finished(CallResult("c", "n", waited_s=0.1))
        clock.now += 0.5
    stop.set()
    reader.join()
    assert broken == []


def test_recording_is_cheap():
    recorder = LLMRecorder()
    one = attempt(0.2, first_token_s=0.1)
    begun = time.process_time()
    for _ in range(20_000):
        recorder.record(one)
    assert (time.process_time() - begun) / 20_000 < 20e-6  # about 1.5 µs on an idle machine


def test_wilson_by_the_textbook():
    # 95 % for 8 of 10: Newcombe (1998) and every calculator give 0.4902 to 0.9433.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(8, 10, z=0.0) == pytest.approx((0.8, 0.8))


@given(st.floats(0, 1), st.floats(1e-3, 1e9), st.floats(0, 10))
def test_wilson_holds_the_share_and_stays_between_zero_and_one(share, n, z):
    low, high = wilson(share * n, n, z)
    assert 0.0 <= low <= share + 1e-9
    assert share - 1e-9 <= high <= 1.0
