"""The feedback bus where no broker answers."""

import gc
import time

import pytest

from chainwax.connectors import open_bus
from chainwax.router import ConfigError, Feedback, LLMManager, load_settings

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture
def nobody(monkeypatch):
    monkeypatch.setattr("chainwax.connectors.kafka_bus._CLOSE_S", 0.2)
    monkeypatch.setattr("chainwax.connectors.kafka.servers.CONNECT_SECONDS", 0.2)
    yield
    for _ in range(5):  # kafka-python leaves its sockets to the collector
        gc.collect()


def opened():
    return open_bus(load_settings(bus={"kind": "kafka", "servers": "127.0.0.1:9"}).bus, "triage")


def test_saying_something_never_waits_for_a_broker(nobody):
    bus = opened()
    begun = time.monotonic()
    for n in range(1000):
        bus.publish([Feedback("route", 1.0, f"call-{n}")])
    assert time.monotonic() - begun < 1.0
    assert bus.snapshot()["to_write"] == 1000
    assert not bus.flush(0.05)
    bus.close()
    assert bus.snapshot()["lost"] == 1000
    bus.publish([Feedback("route", 1.0, "too late")])
    assert bus.snapshot()["lost"] == 1001


def test_no_more_waits_than_fits_into_memory(nobody):
    bus = opened()
    bus._writer._holds = 100
    bus.publish([Feedback("route", 1.0, f"call-{n}") for n in range(70)])
    bus.publish([Feedback("route", 1.0, f"call-{n}") for n in range(70)])
    found = bus.snapshot()
    assert (found["to_write"], found["lost"]) == (100, 40)
    bus.close()


def test_a_run_does_not_begin_without_its_broker(nobody):
    settings = load_settings(
        run={"recording": None}, bus={"kind": "kafka", "servers": "127.0.0.1:9", "catch_up_seconds": 5}
    )
    why = r"feedback bus cannot catch up.*127\.0\.0\.1:9"
    manager = LLMManager(settings, bus=open_bus(settings.bus, "triage"))
    with manager, pytest.raises(ConfigError, match=why):
        manager.begin_run("triage")
