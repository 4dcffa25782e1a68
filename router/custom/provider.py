"""``provider``: a fine-tuning job of whoever serves the base, over the API that OpenAI has and others copied.

The dataset goes up as two files, a job is begun about them, and the model that it names at its end is asked
from then on. What was begun stands in ``job.json`` after each step, so that a training that is cut off goes
on with the job that is there: nothing is paid twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chainwax.router.backends._http import is_loopback
from chainwax.router.config import ModelConfig
from chainwax.router.custom._tuning import Training
from chainwax.router.custom.dataset import Dataset
from chainwax.router.custom.trainer import Limits, Place, Progress, Served, Trained
from chainwax.router.errors import (
    BackendError,
    ConfigError,
    PriceUnknown,
    TrainerFailed,
    nearest,
)
from chainwax.router.prices import Prices
from chainwax.router.types import Tier

__all__ = ["ProviderOptions", "ProviderTrainer"]

_Auto = Literal["auto"]


class ProviderOptions(BaseModel):
    """``[trainers.provider]``. Prices are dollars for one token."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: str
    """The provider's base, up to and with ``/v1``."""
    model: str
    """The base, as the provider names it for tuning."""
    provider: str = ""
    """Whose it is: for ``allow`` and ``deny``, prices and the dialect of its server."""
    region: str = ""
    """Where it runs: for ``allow`` and ``deny``."""
    key_env: str | None = None
    """The environment variable that holds the key; the key itself never stands in a file."""
    headers: dict[str, str] = {}
    """Sent with every request. For secrets use ``key_env``."""
    epochs: Annotated[int, Field(ge=1)] | _Auto = "auto"
    """Times that the data are gone through."""
    batch_size: Annotated[int, Field(ge=1)] | _Auto = "auto"
    """Examples in a batch."""
    learning_rate: Annotated[float, Field(gt=0)] | _Auto = "auto"
    """Factor of the provider's own learning rate."""
    seed: int | None = None
    """Seed of the training."""
    suffix: str | None = None
    """Part of the tuned model's name; None takes the node's."""
    validation: bool = True
    """Send what is held out too, for the provider to measure its loss on."""
    keep_files: bool = False
    """Leave the uploaded files at the provider."""
    poll_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Between two looks at the job."""
    training_cost_per_token: Annotated[float, Field(ge=0)] | None = None
    """What one trained token costs: no library knows it."""
    input_cost_per_token: Annotated[float, Field(ge=0)] | None = None
    """Of the tuned model's prompts; None takes what genai-prices knows."""
    output_cost_per_token: Annotated[float, Field(ge=0)] | None = None
    """Of the tuned model's answers."""


class ProviderTrainer:
    """A provider's supervised fine-tuning job.

    Raises :class:`ConfigError` for options that are wrong, a price that nobody knows included.
    """

    name = "provider"

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            self.options = ProviderOptions(**options)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(one) for one in error.errors())) from None
        self.place = Place(self.options.provider, self.options.region)
        if not is_loopback(self.options.url):
            if not self.options.provider:
                raise ConfigError(
                    "trainers.provider.provider: say whose machines these are: 'allow' and 'deny' go by it"
                )
            if self.options.training_cost_per_token is None:
                raise ConfigError(
                    "trainers.provider.training_cost_per_token: what a trained token costs is in no price "
                    "list: set it, in dollars"
                )
        # Before anything is paid for: a model without a price could not be served.
        self._config(f"ft:{self.options.model}:organisation:suffix:id")

    def fit(self, dataset: Dataset, folder: Path, progress: Progress, limits: Limits) -> Trained:
        """Upload, begin the job (or find the one that was begun), and wait for its end.

        A job that has not ended within ``limits.minutes`` is cancelled.
        """
        try:
            return asyncio.run(Training(self.options, dataset, folder, progress, limits).run())
        except BackendError as error:
            raise TrainerFailed(f"{self._whom()}: {error}") from None

    def serve(self, name: str, trained: Trained, models: Mapping[str, ModelConfig]) -> Served:
        """The tuned model, at the provider where it was trained."""
        if not trained.model:
            raise TrainerFailed(f"model '{name}': what was trained has no name at its provider")
        at = trained.detail.get("url")
        if at != self.options.url:
            raise TrainerFailed(
                f"model '{name}' was trained at {at}, and trainers.provider.url is {self.options.url}"
            )
        return Served(self._config(trained.model))

    def _whom(self) -> str:
        return self.options.provider or self.options.url

    def _config(self, model: str) -> ModelConfig:
        options = self.options
        config = ModelConfig(
            tier=Tier.custom,
            model=model,
            url=options.url,
            key_env=options.key_env,
            headers=options.headers,
            provider=options.provider,
            region=options.region,
            input_cost_per_token=options.input_cost_per_token,
            output_cost_per_token=options.output_cost_per_token,
        )
        try:
            Prices.of("tuned", config)
        except PriceUnknown as error:
            raise PriceUnknown(str(error).replace("models.tuned.", "trainers.provider.")) from None
        return config


def _explain(error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return f"unknown key 'trainers.provider.{loc[-1]}': {nearest(loc[-1], ProviderOptions.model_fields)}"
    # What may be a secret in the wrong place is not shown.
    given = (
        ""
        if loc[0] in ("key_env", "headers") or error["type"] == "missing"
        else f" (it is {str(error['input'])[:60]!r})"
    )
    return f"trainers.provider.{loc[0]}: {error['msg']}{given}"
