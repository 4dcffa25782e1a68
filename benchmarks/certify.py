"""How often a certificate of a target is wrong, and how soon it comes.

200 seeded streams of a simulated node and its strongest model, whose true qualities are known: half begin
below the target, half above; a quarter drift over to the other side; half have the feedback of a fifth of
their calls, the others of all; all of it comes late. The certificate is the router's own
(:mod:`chainwax.router.certificate`): it draws the pairs, sees only the score of the answer that was served,
and is asked after every item.

    python benchmarks/certify.py [--items 6000] [--streams 200] [--share 0.4] [--delay 50] [--seed 1]
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from dataclasses import dataclass

from _contract import report, say

from chainwax.router.certificate import Certificate, Certified

CLEAR = 0.05
"""Margin from which on a stream should soon be called met."""


@dataclass
class Truth:
    """What a stream is like: its two models give the same answer or differ, each right with a chance."""

    margin: float
    """Expected score of the node's answer less target times that of the strongest's."""
    differ: float
    same_right: float
    own_right: float
    strong_right: float


@dataclass
class Stream:
    """One stream: what the node wants, and what its models are like."""

    target: float
    feedback: float
    before: Truth
    after: Truth
    turns: int
    """The item from which on it is ``after``."""


@dataclass
class Seen:
    """What came of one stream."""

    stream: Stream
    met_at: int | None = None
    false_met: bool = False
    """Called met while the mean margin of what the claim is about was below 0."""
    false_met_of_all: bool = False
    """Called met while the mean margin of all items so far was below 0."""
    withdrawn_after: int | None = None
    """Items from a turn for the worse until it was no longer called met; 0 where it was not by then."""
    called_not_met: bool = False
    pairs: int = 0


def truth(rng: random.Random, target: float, margin: float) -> Truth:
    """A node with that margin, else drawn: its models differ at a tenth to two fifths of the items."""
    while True:
        strong, differ = rng.uniform(0.6, 0.95), rng.uniform(0.1, 0.4)
        own = target * strong + margin
        # Of two different answers at most one is right.
        right = rng.uniform(0.7, 1.0)
        own_right = (right + (own - strong) / differ) / 2
        strong_right = right - own_right
        same_right = (strong - differ * strong_right) / (1 - differ)
        if min(own_right, strong_right, same_right) >= 0 and max(own_right, strong_right, same_right) <= 1:
            return Truth(margin, differ, same_right, own_right, strong_right)


def make_stream(rng: random.Random, index: int, items: int) -> Stream:
    """Stream ``index``: even ones begin below the target; each fourth pair drifts."""
    target = rng.choice((0.9, 0.95, 0.97, 0.99))

    def margin(above: bool) -> float:
        if not above:
            return -rng.uniform(0.005, 0.03)
        return rng.uniform(0.005, CLEAR) if rng.random() < 0.4 else rng.uniform(CLEAR, 0.12)

    above = index % 2 == 1
    before = truth(rng, target, margin(above))
    drifts = index // 2 % 4 == 0
    after = truth(rng, target, margin(not above)) if drifts else before
    turns = int(rng.uniform(0.3, 0.7) * items) if drifts else items
    return Stream(target, 0.2 if index // 8 % 2 == 0 else 1.0, before, after, turns)


def watch(stream: Stream, items: int, share: float, delay: int, seed: int) -> Seen:
    """Serve one stream, and compare what the certificate says with the truth after every item."""
    rng = random.Random(seed)
    certificate = Certificate(stream.target, share, seed=seed)
    late: deque[tuple[int, str, str, float, float]] = deque()
    seen = Seen(stream)
    epoch, claimed, of_all = 1, 0.0, 0.0
    for item in range(items):
        now = stream.before if item < stream.turns else stream.after
        of_all += now.margin
        if certificate.draw():
            seen.pairs += 1
            differ = rng.random() < now.differ
            strongest = differ and certificate.coin()
            arm = "strong" if strongest else "own"
            right = (now.strong_right if strongest else now.own_right) if differ else now.same_right
            certificate.paired(str(item), arm, differ=differ, strongest=strongest)
            if rng.random() < stream.feedback:
                when = item + rng.randrange(2 * delay + 1)
                late.append((when, str(item), arm, float(rng.random() < right), now.margin))
        while late and late[0][0] <= item:
            _, call, arm, score, margin = late.popleft()
            before = certificate.scored
            certificate.learn(call, arm, score)
            if certificate.epoch != epoch:
                epoch, claimed = certificate.epoch, 0.0
                seen.called_not_met = True
            elif certificate.scored > before:
                claimed += margin
        if certificate.status is Certified.met:
            seen.met_at = item + 1 if seen.met_at is None else seen.met_at
            seen.false_met |= claimed < 0
            seen.false_met_of_all |= of_all < 0
        elif seen.withdrawn_after is None and item >= stream.turns and stream.before.margin > 0:
            seen.withdrawn_after = item - stream.turns
    return seen


def main() -> None:
    """Run all streams and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", type=int, default=6000, help="items of a stream")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.4, help="of the calls that are paired at first")
    parser.add_argument("--delay", type=int, default=50, help="items that a score is late, on average")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    seen = []
    for index in range(args.streams):
        stream = make_stream(rng, index, args.items)
        seen.append(watch(stream, args.items, args.share, args.delay, rng.randrange(2**31)))
        if (index + 1) % 50 == 0:
            say(f"{index + 1} of {args.streams} streams")
    clear = [
        s.met_at or args.items + 1
        for s in seen
        if s.stream.before is s.stream.after and s.stream.before.margin >= CLEAR and s.stream.feedback == 1.0
    ]
    figures: dict[str, float | str | None] = {}
    within = sorted(clear)[-(-len(clear) * 4 // 5) - 1] if clear else None
    if within is None or within > args.items:
        figures["met_within"] = None
        figures["met_within_why"] = f"of {len(clear)} clear streams, fewer than 80 % were called met"
    else:
        figures["met_within"] = within
    turned = [
        s
        for s in seen
        if s.stream.before.margin > 0 > s.stream.after.margin
        and s.met_at is not None
        and s.met_at <= s.stream.turns
    ]
    gone = sorted(args.items if s.withdrawn_after is None else s.withdrawn_after for s in turned)
    below = [s for s in seen if s.stream.before is s.stream.after and s.stream.before.margin < 0]
    above = [s for s in seen if s.stream.before is s.stream.after and s.stream.before.margin > 0]
    figures["withdrawn_after_p50"] = gone[len(gone) // 2] if gone else None
    if not gone:
        figures["withdrawn_after_p50_why"] = "no stream that was called met turned for the worse"
    report(
        "certify",
        simulated=["own", "strong"],
        streams=args.streams,
        items=args.items,
        share=args.share,
        delay=args.delay,
        false_met_rate=sum(s.false_met for s in seen) / len(seen),
        false_met_rate_of_those_below=sum(s.false_met for s in below) / max(len(below), 1),
        false_met_of_all_items_rate=sum(s.false_met_of_all for s in seen) / len(seen),
        false_not_met_rate=sum(s.called_not_met for s in above) / max(len(above), 1),
        found_below_rate=sum(s.called_not_met for s in below) / max(len(below), 1),
        clear_streams=len(clear),
        **figures,
        pairs_share=sum(s.pairs for s in seen) / (len(seen) * args.items),
    )


if __name__ == "__main__":
    main()
