"""Where prices come from, and what a call costs."""

import pytest

from chainwax.router.config import ModelConfig
from chainwax.router.errors import PriceUnknown
from chainwax.router.prices import Price, Prices
from chainwax.router.types import Usage

CLOUD = "https://api.openai.com/v1"
HERE = "http://127.0.0.1:8000/v1"


def price(**config):
    return Prices.of("m", ModelConfig(**{"tier": "standard", "model": "gpt-4o-mini", "url": CLOUD} | config))


def test_what_is_stated_wins():
    found = price(input_cost_per_token=1e-6, output_cost_per_token=4e-6, cache_read_input_token_cost=2e-7)
    assert found.source == "configuration"
    cost = found.cost(Usage(input=1000, output=100, cached=400), seconds=5, in_flight=3)
    assert cost == pytest.approx(600e-6 + 400 * 2e-7 + 400e-6)
    assert found.estimate(1000, 100) == pytest.approx(1000e-6 + 400e-6)


def test_cached_tokens_cost_as_much_as_others_where_nothing_is_said():
    found = price(input_cost_per_token=1e-6, output_cost_per_token=0)
    assert found.cost(Usage(input=1000, cached=1000), 1, 1) == pytest.approx(1e-3)


def test_more_cached_than_sent_never_pays_back():
    found = price(input_cost_per_token=1e-6, output_cost_per_token=0, cache_read_input_token_cost=0)
    assert found.cost(Usage(input=10, cached=10**9), 1, 1) == 0


def test_the_hour_is_shared_by_what_is_served_at_once():
    found = price(url=HERE, per_hour=3.6)
    assert found.source == "configuration"
    assert found.cost(Usage(input=10**6, output=10**6), seconds=2.0, in_flight=1) == pytest.approx(0.002)
    assert found.cost(Usage(), seconds=2.0, in_flight=4) == pytest.approx(0.0005)
    assert found.cost(Usage(), seconds=2.0, in_flight=0) == pytest.approx(0.002)
    both = price(url=HERE, per_hour=3.6, input_cost_per_token=1e-6)
    assert both.cost(Usage(input=1000), 1.0, 1) == pytest.approx(0.001 + 0.001)


@pytest.mark.parametrize(
    "config",
    [{"provider": "openai"}, {}, {"provider": "openai", "url": HERE}, {"provider": "a-name-for-the-rules"}],
)
def test_the_library_knows_by_provider_or_by_address(config):
    found = price(**config)
    assert found.source == "genai-prices"
    assert found.tiered is None
    # gpt-4o-mini, as its maker has listed it since 2024.
    assert found.cost(Usage(input=1_000_000), 1, 1) == pytest.approx(0.15)
    assert found.cost(Usage(output=1_000_000), 1, 1) == pytest.approx(0.60)
    assert found.cost(Usage(input=1_000_000, cached=1_000_000), 1, 1) == pytest.approx(0.075)


def test_the_flat_price_is_the_library_s_own_sum():
    from genai_prices import Usage as Tokens
    from genai_prices import calc_price

    theirs = calc_price(
        Tokens(input_tokens=1234, output_tokens=567, cache_read_tokens=890),
        "gpt-4o-mini",
        provider_id="openai",
    )
    ours = price(provider="openai").cost(Usage(1234, 567, 890), 1, 1)
    assert ours == pytest.approx(float(theirs.total_price))


def test_a_tiered_price_asks_the_library_for_each_call():
    found = price(provider="google", model="gemini-2.5-pro", url="https://generativelanguage.googleapis.com")
    assert found.tiered is not None
    assert "number of tokens" in found.note
    below, above = found.cost(Usage(input=100_000), 1, 1), found.cost(Usage(input=300_000), 1, 1)
    assert above > 3.5 * below
    assert found.estimate(300_000, 0) == pytest.approx(above)


def test_a_price_by_the_hour_of_day_asks_for_each_call():
    found = price(provider="deepseek", model="deepseek-chat", url="https://api.deepseek.com")
    assert found.tiered is not None
    assert "hour" in found.note
    assert found.cost(Usage(input=1000), 1, 1) > 0


def test_a_price_that_changes_at_a_date_is_flat_today():
    found = price(provider="openai", model="o3")
    assert (found.source, found.tiered) == ("genai-prices", None)


def test_one_stated_price_is_completed_by_the_library():
    found = price(provider="openai", output_cost_per_token=1e-5)
    assert (found.input, found.output, found.source) == (pytest.approx(1.5e-7), 1e-5, "configuration")
    assert found.cached == pytest.approx(7.5e-8)
    assert price(provider="openai", input_cost_per_token=9e-7).cached == 9e-7


def test_free_on_this_machine():
    for url in (HERE, "http://localhost:1/v1", "http://[::1]:1/v1"):
        found = price(url=url, model="some-local-model")
        assert (found.source, found.cost(Usage(10, 10), 9, 1)) == ("free", 0)
        assert found.note
    engine = Prices.of("m", ModelConfig(tier="local", backend="llamacpp"))
    assert engine.source == "free"
    hourly = Prices.of("m", ModelConfig(tier="local", backend="llamacpp", per_hour=0.36))
    assert hourly.cost(Usage(), 10, 1) == pytest.approx(0.001)


@pytest.mark.parametrize("model", ["gpt-4o-mini", "gpt-4o"])
def test_a_local_server_is_not_charged_for_a_name_that_a_cloud_has_too(model):
    assert price(url=HERE, model=model).source == "free"


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model": "gpt-4o-mny", "provider": "openai"}, "did you mean 'gpt-4o-mini'"),
        ({"model": "gpt-4o-mny"}, "did you mean 'gpt-4o-mini'"),
        ({"url": "https://gpu.example.org/v1"}, "does not know its provider"),
        ({"url": "https://gpu.example.org/v1", "provider": "vllm"}, "does not know its provider"),
        ({"url": "http://127.0.0.1.example.org/v1"}, "does not know its provider"),
        ({"backend": "simulated"}, "simulated model has to state"),
        ({"backend": "simulated", "provider": "openai"}, "simulated model has to state"),
    ],
)
def test_an_unknown_price_names_the_key_to_set(config, match):
    with pytest.raises(PriceUnknown, match=r"^models\.m\.input_cost_per_token") as caught:
        price(**config)
    assert match in str(caught.value)


def test_half_a_price_names_the_other_half():
    with pytest.raises(PriceUnknown, match=r"^models\.m\.output_cost_per_token"):
        price(url=HERE, model="own", input_cost_per_token=1e-6)
    with pytest.raises(PriceUnknown, match=r"^models\.m\.input_cost_per_token"):
        price(url=HERE, model="own", output_cost_per_token=1e-6)
    with pytest.raises(PriceUnknown, match=r"^models\.m\.output_cost_per_token.*simulated"):
        price(backend="simulated", input_cost_per_token=1e-6)


def test_simulated_models_cost_what_they_state():
    found = price(backend="simulated", input_cost_per_token=1e-6, output_cost_per_token=2e-6)
    assert found.cost(Usage(10, 10), 1, 1) == pytest.approx(3e-5)


def test_prices_are_values():
    assert Price(1, 2) == Price(1, 2)
