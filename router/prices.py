"""What a model's answers cost, looked up once for each model and cheap for each call.

Prices come from the configuration, else from the ``genai-prices`` library, which works offline. All
are US dollars.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from chainwax.router.backends._http import is_loopback
from chainwax.router.config import ModelConfig
from chainwax.router.errors import PriceUnknown, nearest
from chainwax.router.types import Usage

if TYPE_CHECKING:
    from genai_prices.types import PriceCalculation

__all__ = ["Price", "Prices"]


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one model."""

    input: float = 0.0
    """Dollars for one token of the prompt."""
    output: float = 0.0
    """Dollars for one token of the answer."""
    cached: float = 0.0
    """Dollars for one token of the prompt that a cache held."""
    per_hour: float = 0.0
    """Dollars for an hour of the machine, shared by what it serves at once."""
    source: str = "configuration"
    """``configuration``, ``genai-prices`` or ``free``."""
    note: str = ""
    """What a person should know of this price."""
    tiered: Callable[[Usage], float] | None = None
    """Set where tokens have no one price (it depends on how many, or on the hour): asked for each call."""

    def cost(self, usage: Usage, seconds: float, in_flight: int) -> float:
        """Dollars for one answer that took ``seconds`` while ``in_flight`` requests were served."""
        if self.tiered is not None:
            tokens = self.tiered(usage)
        else:
            cached = min(usage.cached, usage.input)
            tokens = (usage.input - cached) * self.input + cached * self.cached + usage.output * self.output
        return tokens + self.per_hour / 3600 * seconds / max(1, in_flight)

    def estimate(self, input_tokens: float, output_tokens: float) -> float:
        """Dollars for the tokens of a call not made yet, nothing cached, time not counted."""
        if self.tiered is not None:
            return self.tiered(Usage(round(input_tokens), round(output_tokens)))
        return input_tokens * self.input + output_tokens * self.output


class Prices:
    """Where prices come from."""

    @staticmethod
    def of(name: str, config: ModelConfig) -> Price:
        """The price of the model that the configuration calls ``name``.

        First what the configuration states, then what genai-prices knows; the embedded engine and
        servers on this machine are free where neither says a word.

        Raises :class:`PriceUnknown` with the key to set.
        """
        sent, made = config.input_cost_per_token, config.output_cost_per_token
        per_hour = config.per_hour or 0.0
        if config.per_hour is not None or (sent is not None and made is not None):
            sent, made = sent or 0.0, made or 0.0
            cached = config.cache_read_input_token_cost
            return Price(sent, made, sent if cached is None else cached, per_hour)
        missing = f"models.{name}.{'output' if sent is not None else 'input'}_cost_per_token"
        if config.backend == "simulated":
            raise PriceUnknown(f"{missing}: a simulated model has to state its prices")
        listed = None if config.backend in ("llamacpp", "head") else _listed(config)
        if listed is not None:
            return _with_overrides(listed, config)
        if sent is not None or made is not None:
            raise PriceUnknown(f"{missing}: set it too, for genai-prices does not know the model")
        if config.backend == "head":
            return Price(source="free", note="a classifier in this process")
        if config.backend == "llamacpp":
            return Price(source="free", note="runs on this machine; set 'per_hour' to count its time")
        if is_loopback(config.url):
            return Price(source="free", note="a server on this machine without a price is taken as free")
        raise PriceUnknown(
            f"{missing}: the price of '{config.model}' is unknown ({_advice(config)}); set it, and "
            f"output_cost_per_token, in dollars for one token, or 'per_hour'"
        )


def _with_overrides(listed: Price, config: ModelConfig) -> Price:
    """The library's price with what the configuration states in its place."""
    stated = (config.input_cost_per_token, config.output_cost_per_token, config.cache_read_input_token_cost)
    if stated == (None, None, None):
        return listed
    sent = listed.input if stated[0] is None else stated[0]
    cached = stated[2]
    if cached is None:
        cached = listed.cached if stated[0] is None else sent
    made = listed.output if stated[1] is None else stated[1]
    return Price(sent, made, cached, note="completed from genai-prices")


def _listed(config: ModelConfig) -> Price | None:
    """The price that genai-prices has for a model; None where it has none."""
    # Here and not above: the import takes a second, and a configuration with prices does without.
    from genai_prices import Usage as Tokens
    from genai_prices import calc_price
    from genai_prices.types import StartDateConstraint, TieredPrices

    def ask(tokens: Tokens) -> PriceCalculation | None:
        if config.provider:
            try:
                return calc_price(tokens, config.model, provider_id=config.provider)
            except LookupError:
                pass  # a provider may be named for the rules alone
        try:
            return calc_price(tokens, config.model, provider_api_url=config.url)
        except LookupError:
            return None

    found = ask(Tokens())
    if found is None:
        return None
    model, provider = found.model, found.provider

    def dollars(usage: Usage) -> float:
        tokens = Tokens(
            input_tokens=usage.input,
            output_tokens=usage.output,
            cache_read_tokens=min(usage.cached, usage.input),
        )
        return float(
            model.calc_price(tokens, provider, genai_request_timestamp=datetime.now(UTC)).total_price
        )

    many = 1_000_000
    sent = dollars(Usage(input=many)) / many
    made = dollars(Usage(output=many)) / many
    cached = dollars(Usage(input=many, cached=many)) / many
    by_hour = isinstance(model.prices, list) and any(
        price.constraint is not None and not isinstance(price.constraint, StartDateConstraint)
        for price in model.prices
    )
    by_amount = any(isinstance(price, TieredPrices) for price in vars(found.model_price).values())
    by_request = float(found.total_price) != 0.0
    if by_hour or by_amount or by_request:
        note = "the price changes with the " + ("hour" if by_hour else "number of tokens")
        return Price(sent, made, cached, source="genai-prices", note=note, tiered=dollars)
    return Price(sent, made, cached, source="genai-prices")


def _advice(config: ModelConfig) -> str:
    from genai_prices.data_snapshot import get_snapshot

    try:
        provider = get_snapshot().find_provider(None, config.provider or None, config.url or None)
    except LookupError:
        return "genai-prices does not know its provider"
    known = nearest(config.model, (model.id for model in provider.models))
    return f"of '{provider.id}' genai-prices knows other models: {known}"
