"""The bus that the configuration asks for; no broker is needed to say what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from chainwax.connectors import InProcessBus, open_bus
from chainwax.connectors.kafka_bus import KafkaBus
from chainwax.router import ConfigError, load_settings
from chainwax.router.feedback import SharedBus


def opened(**bus: Any) -> Any:
    return open_bus(load_settings(bus=bus).bus, "triage")


def test_the_default_stays_in_this_process() -> None:
    bus = open_bus(load_settings().bus, "triage")
    assert type(bus) is InProcessBus
    assert not isinstance(bus, SharedBus)


def test_topics_follow_the_prefix_or_have_names_of_their_own() -> None:
    bus = opened(kind="kafka", prefix="acme.prod", topics={"calls": "llm-calls"})
    assert isinstance(bus, KafkaBus)
    assert isinstance(bus, SharedBus)
    topics = bus.topics
    assert (topics.feedback, topics.calls) == ("acme.prod.feedback", "llm-calls")
    assert (topics.decisions, topics.dead_letters) == ("acme.prod.decisions", "acme.prod.dead-letters")
    bus.close()


@pytest.mark.parametrize(
    ("bus", "why"),
    [
        ({"kind": "rabbit"}, "bus.kind"),
        ({"kind": "kafka", "prefix": "with space"}, "bus.prefix"),
        ({"kind": "kafka", "topics": {"feedbacks": "x"}}, "bus.topics"),
        ({"kind": "kafka", "severs": "x"}, "did you mean 'servers'"),
        ({"kind": "kafka", "servers": "nowhere"}, "HOST:PORT"),
        ({"kind": "kafka", "options": {"sasl_mecanism": "PLAIN"}}, "did you mean 'sasl_mechanism'"),
        ({"kind": "kafka", "options": {"security_protocol": "SSSL"}}, "did you mean 'SSL'"),
        ({"kind": "kafka", "options": {"security_protocol": "SASL_SSL"}}, "CHAINWAX_KAFKA_SASL_PASSWORD"),
        ({"kind": "kafka", "options": {"settings": "x"}}, "settings"),
    ],
)
def test_what_cannot_work_is_told_at_once(
    bus: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHAINWAX_KAFKA_SASL_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match=why):
        opened(**bus)
