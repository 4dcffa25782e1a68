"""What can go wrong in the router, as one tree.

* ChainwaxError
    x ConfigError                 a configuration, a flow or a command is wrong: say so before any call
      · UnknownName               a name that nothing has, with the nearest one that exists
      · UnknownModelType
      · PriceUnknown
    x CallError                   one call failed; the item goes to the dead letters
      · PromptFieldMissing        the item lacks a field that the prompt names
      · AnswerInvalid             the model answered, and the answer cannot be used
      · NoModelAllowed            allow and deny, or the types, leave no model
      · BudgetSpent
      · Cancelled                 the run was stopped before the call was made
      · BackendError              one attempt at one model failed
          - BackendDown           cannot be reached, or 5xx
          - BackendTimeout
          - BackendBusy           429, 503, 529, with the seconds it asks to wait
          - BackendRefused        4xx: the same request will never work
          - BackendGarbled        the body is not what the API promises
          - Abstains              the model is there, and rather says nothing
    x RecordingError              the recording cannot be written or read
    x TrainerFailed               a model of a node's own cannot be made, proved or served
      · DatasetUnfit              what is recorded is too little, or says nothing
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "Abstains",
    "AnswerInvalid",
    "BackendBusy",
    "BackendDown",
    "BackendError",
    "BackendGarbled",
    "BackendRefused",
    "BackendTimeout",
    "BudgetSpent",
    "CallError",
    "Cancelled",
    "ChainwaxError",
    "ConfigError",
    "DatasetUnfit",
    "NoModelAllowed",
    "PriceUnknown",
    "PromptFieldMissing",
    "RecordingError",
    "TrainerFailed",
    "UnknownModelType",
    "UnknownName",
    "nearest",
]


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase that helps with a mistyped name: the nearest known one, else all of them."""
    names = sorted(set(known))
    close = get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    if close:
        return f"did you mean '{next(n for n in names if n.lower() == close[0])}'?"
    if not names:
        return "there are none"
    return "known: " + ", ".join(names[:20]) + (" …" if len(names) > 20 else "")


class ChainwaxError(Exception):
    """The root of everything that chainwax raises on purpose."""


class ConfigError(ChainwaxError):
    """A configuration, a flow or a command line that cannot work."""


class UnknownName(ConfigError):
    """A name that nothing has."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {what} '{name}': {nearest(name, known)}")


class UnknownModelType(UnknownName):
    """A model type that is not one of the fixed set."""


class PriceUnknown(ConfigError):
    """No price is known for a model, and the configuration states none."""


class CallError(ChainwaxError):
    """One call failed; its item goes to the dead letters."""


class PromptFieldMissing(CallError):
    """The item lacks a field that the prompt names."""


class AnswerInvalid(CallError):
    """The model answered, but the answer is not one that the node can use."""


class NoModelAllowed(CallError):
    """No model is left for a node by its allow and deny, its type and what is up."""


class BudgetSpent(CallError):
    """The budget that was given is spent."""


class Cancelled(CallError):
    """The run was stopped before the call was made; nothing was paid for it."""


class BackendError(CallError):
    """One attempt at one model failed.

    ``retry_after`` is in seconds, where the server told; ``retryable`` says whether the same
    request may work later.
    """

    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BackendDown(BackendError):
    """The server cannot be reached, or answered 5xx."""


class BackendTimeout(BackendError):
    """The server did not answer in time."""


class BackendBusy(BackendError):
    """The server has no room now: 429, 503 or 529."""


class BackendRefused(BackendError):
    """The server will never accept this request: 4xx."""

    retryable = False


class BackendGarbled(BackendError):
    """The body is not what the API promises: truncated JSON, empty, another shape."""


class Abstains(BackendError):
    """The model is not sure of its answer: the next one is to be asked."""

    retryable = False


class TrainerFailed(ChainwaxError):
    """A model of a node's own cannot be made, proved or served."""


class DatasetUnfit(TrainerFailed):
    """What is recorded of a node is too little to train on, or has nothing to learn in it."""


class RecordingError(ChainwaxError):
    """The recording cannot be written or read."""
