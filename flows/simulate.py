"""``chainwax simulate``: the simulated models of a configuration as a server that other processes ask.

A model that stands for a real one in a trial of a whole deployment: what it answers is made up by the stated
accuracy, and marked so in each answer.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import typer

from chainwax.flows.options import ConfigFile, make_console
from chainwax.flows.serve import Address, address_of
from chainwax.router import ConfigError, ModelConfig, load_settings
from chainwax.router.backends._simulation import SimulatedModel
from chainwax.router.backends.simserver import SimulationServer

__all__ = ["simulate_command"]


def simulate_command(
    config: ConfigFile = None,
    serve: Annotated[
        str | None,
        typer.Option(metavar="[HOST:]PORT", help="Where to listen; else on PORT of the environment."),
    ] = None,
) -> None:
    """Serve simulated models over OpenAI's API until Ctrl-C: a stand-in for real ones, and marked so."""
    settings = load_settings(config)
    models = {
        name: model
        for name, model in settings.models.items()
        if model.backend == "simulated" or model.simulate_without_key
    }
    if not models:
        raise ConfigError(
            "no model of the configuration is simulated: one has backend = 'simulated', or "
            "simulate_without_key = true"
        )
    address = address_of(serve, settings)
    if address is None:
        raise ConfigError("nobody says where to listen: add --serve PORT")
    asyncio.run(_serve(address, models))


async def _serve(address: Address, models: dict[str, ModelConfig]) -> None:
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, over.set)
    server = SimulationServer(address.host, address.port)
    try:
        for name, model in models.items():
            await server.add(SimulatedModel(name, model.simulation))
    except OSError as error:
        raise ConfigError(f"simulated models cannot be served at {address}: {error.strerror}") from None
    make_console(stderr=True).print(
        f"simulated models {', '.join(models)} at {server.url}", markup=False, soft_wrap=True
    )
    await over.wait()
    for name in models:
        await server.remove(name)
