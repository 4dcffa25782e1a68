"""Which process of a cluster over several machines this one is, as Bytewax's own options say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chainwax.router import ConfigError

__all__ = ["Place", "placed"]


@dataclass(frozen=True, slots=True)
class Place:
    """One process of several."""

    index: int
    """Which, from 0."""
    addresses: tuple[str, ...]
    """``host:port`` of each, in order, the same on all machines."""


def placed(process_id: int | None, addresses: str | None, environment: Mapping[str, str]) -> Place | None:
    """The place that ``-i`` and ``-a`` name, or what Bytewax's Helm chart sets; None where nothing does.

    >>> placed(1, "one:2101;two:2101", {})
    Place(index=1, addresses=('one:2101', 'two:2101'))

    Raises :class:`ConfigError` where they do not go together.
    """
    pod, name = environment.get("BYTEWAX_POD_NAME"), environment.get("BYTEWAX_STATEFULSET_NAME")
    if process_id is None and pod and name:
        number = pod.removeprefix(f"{name}-")
        if not number.isdecimal():
            raise ConfigError(f"BYTEWAX_POD_NAME is '{pod}', and not '{name}-' with a number")
        process_id = int(number)
    file = environment.get("BYTEWAX_HOSTFILE_PATH")
    if process_id is not None and addresses is None and file:
        try:
            addresses = ";".join(Path(file).read_text(encoding="utf-8").split())
        except OSError as error:
            raise ConfigError(f"BYTEWAX_HOSTFILE_PATH: {file} cannot be read: {error.strerror}") from None
    if process_id is None and addresses is None:
        return None
    if process_id is None or addresses is None:
        lacking = "-i/--process-id" if process_id is None else "-a/--addresses"
        raise ConfigError(f"a process of several needs both -i and -a: {lacking} is lacking")
    known = tuple(part.strip() for part in addresses.replace(",", ";").split(";") if part.strip())
    for address in known:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"-a/--addresses: '{address}' is not host:port")
    if len(set(known)) < len(known):
        raise ConfigError("-a/--addresses: an address is there twice")
    if process_id >= len(known):
        raise ConfigError(
            f"-i/--process-id {process_id}: there are {len(known)} addresses, so processes are 0 to "
            f"{len(known) - 1}"
        )
    return Place(process_id, known)
