"""What becomes of scores: about which call they are, and what of them is new."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chainwax.connectors.bus_ledger import Ledger
from chainwax.connectors.wire import CallLine, CallsMessage, FeedbackMessage, decode
from chainwax.router.types import CallRef, Feedback

FLOW = "triage"


def calls(*ids: str, node: str = "route", arm: str = "big", flow: str = FLOW, item: str = "") -> CallsMessage:
    lines = [CallLine(call_id=one, node=node, arm=arm, item_key=item) for one in ids]
    return CallsMessage(version=1, flow=flow, run="r", calls=lines)


def say(
    ledger: Ledger, score: float = 0.5, at: float = 1000.0, size: int = 100, **more: Any
) -> list[Feedback]:
    message = FeedbackMessage(version=1, score=score, **more)
    return ledger.feedback(message, at=at, place="t:0:0", size=size, now=at)


def full(**more: Any) -> dict[str, Any]:
    return {"call_id": "c", "node": "route", "arm": "big", "source": "s", **more}


def test_a_score_that_says_everything_needs_no_call() -> None:
    (one,) = say(Ledger(FLOW), **full(metric="m", item_key="i", correction=[1], time=999.0))
    assert one == Feedback("route", 0.5, "c", "i", "big", "m", "s", one.kind, 999.0, [1])


def test_a_score_by_its_calls_id_alone() -> None:
    ledger = Ledger(FLOW)
    ledger.calls(calls("c"))
    (one,) = say(ledger, call_id="c")
    assert (one.node, one.arm, one.call_id, one.time) == ("route", "big", "c", 1000.0)


def test_a_score_by_item_is_about_the_last_call() -> None:
    ledger = Ledger(FLOW)
    ledger.calls(calls("old", item="i"))
    ledger.calls(calls("new", item="i", arm="small"))
    ledger.calls(calls("other", node="answer", item="i"))
    (one,) = say(ledger, node="route", item_key="i")
    assert (one.call_id, one.arm) == ("new", "small")


def test_an_arm_that_the_sender_names_is_kept() -> None:
    ledger = Ledger(FLOW)
    ledger.calls(calls("c"))
    (one,) = say(ledger, call_id="c", arm="shadow")
    assert one.arm == "shadow"


def test_a_score_about_an_arm_without_a_call_counts_each_time() -> None:
    ledger = Ledger(FLOW)
    assert [len(say(ledger, node="route", arm="big")) for _ in range(3)] == [1, 1, 1]


def test_duplicates_revisions_and_what_is_out_of_order() -> None:
    ledger = Ledger(FLOW)
    assert len(say(ledger, 0.5, **full(time=10.0))) == 1
    assert say(ledger, 0.5, **full(time=10.0)) == []
    assert [f.score for f in say(ledger, 0.7, **full(time=11.0))] == [0.7]
    assert say(ledger, 0.5, **full(time=10.5)) == []
    assert len(say(ledger, 0.5, **full(time=10.0, source="other"))) == 1
    assert len(say(ledger, 0.5, **full(time=10.0, metric="other"))) == 1
    assert len(say(ledger, 0.5, **full(time=10.0, arm="small"))) == 1
    wanted = {"duplicate": 1, "revised": 1, "out_of_order": 1, "passed_on": 5, "received": 7}
    assert {name: ledger.counts[name] for name in wanted} == wanted


def test_without_times_the_order_of_the_topic_counts() -> None:
    ledger = Ledger(FLOW)
    said = [say(ledger, score, at=5.0, **full()) for score in (0.1, 0.9, 0.1)]
    assert [len(one) for one in said] == [1, 1, 1]


def test_a_clock_that_is_ahead_does_not_make_a_score_the_last_word() -> None:
    ledger = Ledger(FLOW)
    say(ledger, 0.1, at=1000.0, **full(time=9e9))
    (one,) = say(ledger, 0.9, at=1001.0, **full(time=1001.0))
    assert one.score == 0.9


def test_late_scores_are_counted_and_learned() -> None:
    ledger = Ledger(FLOW)
    assert len(say(ledger, at=1000.0, **full(time=900.0))) == 1
    assert ledger.counts["late"] == 1


def test_scores_wait_for_their_call_in_the_order_in_which_they_were_said() -> None:
    ledger = Ledger(FLOW)
    assert say(ledger, 0.1, call_id="c", source="a") == []
    assert say(ledger, 0.2, call_id="c", source="b") == []
    assert say(ledger, 0.3, node="route", item_key="i") == []
    assert ledger.waiting == 3
    released = ledger.calls(calls("c", item="i"))
    assert [(f.score, f.call_id) for f in released] == [(0.1, "c"), (0.2, "c"), (0.3, "c")]
    assert ledger.waiting == 0
    assert ledger.overdue(1e9) == ([], [])


def test_a_revision_that_overtakes_one_that_waits_stays() -> None:
    ledger = Ledger(FLOW)
    say(ledger, 0.1, call_id="c", source="s", time=10.0)
    (newer,) = say(ledger, 0.9, **full(time=11.0))
    assert newer.score == 0.9
    assert ledger.calls(calls("c")) == []
    assert ledger.counts["out_of_order"] == 1


def test_what_nobody_announces_is_looked_up_and_else_unknown() -> None:
    asked = []

    def look_up(*what: str) -> CallRef | None:
        asked.append(what)
        return CallRef("answer", "old", "small", "seen") if what[0] == "old" else None

    ledger = Ledger(FLOW, look_up=look_up)
    say(ledger, 0.1, call_id="old")
    say(ledger, 0.2, call_id="nobody")
    say(ledger, 0.3, node="route", item_key="i")
    assert ledger.overdue(1004.9) == ([], [])
    assert asked == []
    found, unknown = ledger.overdue(1005.1)
    assert [(f.node, f.arm, f.score, f.context) for f in found] == [("answer", "small", 0.1, "seen")]
    assert [one.message.score for one in unknown] == [0.2, 0.3]
    assert ledger.counts["unknown_call"] == 2
    assert asked == [("old", "", ""), ("nobody", "", ""), ("", "route", "i")]


def test_what_waits_is_bounded_in_number_and_in_bytes() -> None:
    ledger = Ledger(FLOW, parked=10, parked_bytes=1000)
    for n in range(100):
        say(ledger, call_id=f"c{n}", size=10)
    _, unknown = ledger.overdue(1000.0)
    assert (len(unknown), ledger.waiting) == (90, 10)
    say(ledger, call_id="fat", size=5000)
    _, unknown = ledger.overdue(1000.0)
    assert unknown[-1].message.call_id == "fat"
    assert ledger.waiting == 0


def test_calls_are_forgotten_oldest_first() -> None:
    ledger = Ledger(FLOW, calls=3)
    ledger.calls(calls("a", "b", "c", "d"))
    assert say(ledger, call_id="a") == []
    assert len(say(ledger, call_id="b")) == 1


def test_scores_are_forgotten_oldest_first() -> None:
    ledger = Ledger(FLOW, scores=2)
    for call_id in ("a", "b", "c"):
        say(ledger, **full(call_id=call_id))
    assert len(say(ledger, **full(call_id="a"))) == 1
    assert say(ledger, **full(call_id="c")) == []


@pytest.mark.parametrize("named", [True, False])
def test_other_flows_are_passed_over(named: bool) -> None:
    ledger = Ledger(FLOW)
    ledger.calls(calls("theirs", flow="other", item="i"))
    if named:
        assert say(ledger, flow="other", **full()) == []
    else:
        assert say(ledger, call_id="theirs") == []
    assert ledger.counts["other_flow"] == 1
    assert say(ledger, node="route", item_key="i") == []  # it is the other flow's item
    assert ledger.waiting == 1


def test_two_ledgers_make_the_same_of_the_same() -> None:
    def run() -> list[Feedback]:
        ledger = Ledger(FLOW, calls=20, scores=20, parked=5)
        out: list[Feedback] = []
        for n in range(300):
            out += ledger.calls(calls(f"c{n * 7 % 90}", item=f"i{n % 11}"))
            out += say(ledger, n % 10 / 10, at=n, call_id=f"c{n * 13 % 90}", time=float(n * 31 % 50))
            out += say(ledger, n % 7 / 7, at=n, node="route", item_key=f"i{n % 13}")
            out += ledger.overdue(n)[0]
        return out

    first = run()
    assert len(first) > 100
    assert run() == first


def path_message(score: float, *calls: str, **more: Any) -> FeedbackMessage:
    path = [{"node": node, "call_id": f"call-{node}", "arm": "small"} for node in calls]
    raw = json.dumps(
        {"version": 1, "score": score, "call_id": "call-b", "node": "b", "arm": "small", "path": path, **more}
    )
    return decode(FeedbackMessage, raw.encode())


def test_the_score_of_a_path_keeps_its_calls_and_its_weight() -> None:
    ledger = Ledger("flow")
    told = ledger.feedback(path_message(0.5, "a", "b", weight=0.2), at=1.0, place="p", size=9, now=1.0)
    assert [ref.node for ref in told[0].path] == ["a", "b"]
    assert told[0].weight == 0.2


def test_the_same_score_of_the_same_path_is_a_duplicate_and_another_path_is_a_revision() -> None:
    ledger = Ledger("flow")
    for message in (path_message(0.5, "a", "b"), path_message(0.5, "a", "b"), path_message(0.5, "b")):
        ledger.feedback(message, at=1.0, place="p", size=9, now=1.0)
    assert (ledger.counts["duplicate"], ledger.counts["revised"]) == (1, 1)
    again = Ledger("flow")
    again.restore(json.loads(json.dumps(ledger.state())))
    again.feedback(path_message(0.5, "b"), at=1.0, place="p", size=9, now=1.0)
    assert again.counts["duplicate"] == 1
