"""Listeners one after the other, without a state and without models: the quick way through them.

Such a line needs no order of its own and no key: each item goes through all of it where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chainwax.flows.agents.groups import Group, Member
from chainwax.flows.chainstream._world import invoking
from chainwax.flows.chainstream.stream import copied, items_of
from chainwax.operators.item import FailedItem, Item

__all__ = ["run_line"]


class _Sending:
    """What a listener sends while it runs."""

    __slots__ = ("member", "sent", "time")

    def __init__(self) -> None:
        self.time = 0.0
        self.sent: list[tuple[str, Any]] = []
        self.member: Member | None = None

    def emit(self, stream: str, item: Any) -> None:
        assert self.member is not None
        self.member.check_write(stream)
        self.sent.append((stream, copied(item)))  # the listener may go on with it

    def ask(self, kind: str, prompt: Any, frame: Any) -> str:
        raise RuntimeError(f"'{frame.f_code.co_name}' asks a model, which its source does not show")


def run_line(group: Group) -> Callable[[list[Item]], list[Any]]:
    """From items to what the line gives: pairs of a stream and an item, and failures.

    Where it has one stream only, the items alone.
    """
    members: Sequence[Member] = group.members
    outside = frozenset(group.outputs)
    alone = len(outside) == 1

    def work(batch: list[Item]) -> list[Any]:
        out: list[Any] = []
        sending = _Sending()
        before = invoking(sending)
        try:
            for item in batch:
                values = [(item.value, item.position)]
                for place, member in enumerate(members):
                    values = _through(member, place, values, item, sending, out)
                    if not values:
                        break
        finally:
            invoking(before)
        return out

    after = [member.listener.stream for member in members[1:]] + [""]

    def _through(
        member: Member,
        place: int,
        values: list[tuple[Any, str]],
        item: Item,
        sending: _Sending,
        out: list[Any],
    ) -> list[tuple[Any, str]]:
        listener = member.listener
        sending.member = member
        following = after[place]
        on: list[tuple[Any, str]] = []
        if not listener.active:
            return on
        for value, position in values:
            failed: BaseException | None = None
            try:
                returned = listener.fn(value)
                if returned is not None:
                    sent = [(listener.output, one) for one in items_of(returned)]
                    sent = [*sending.sent, *sent] if sending.sent else sent
                else:
                    sent = sending.sent
            except (Exception, SystemExit) as error:
                failed, sent = error, sending.sent
            if sending.sent:
                sending.sent = []
            for number, (stream, one) in enumerate(sent):
                at = f"{position}/{number}"
                if stream == following:
                    on.append((one, at))
                if stream in outside:
                    new = Item(one, item.key, at, item.time, item.calls, item.window_id)
                    out.append(new if alone else (stream, new))
            if failed is not None:
                root = Item(value, item.key, position, item.time, item.calls, item.window_id)
                out.append(FailedItem.of(root, listener.id, failed))
        return on

    return work
