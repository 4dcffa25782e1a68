"""The training itself: texts packed into rows, the loss of the answers alone, early stopping.

AdamW with a warm-up and a cosine (Loshchilov and Hutter 2017, 2019), gradients clipped at norm 1. What is
held out is the end of the examples in time; the adapter that did best there is the one that is kept.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from chainwax.router.custom.lora.base import Base
from chainwax.router.custom.lora.forward import Adapter, as_weights, hidden, new_adapter, score

__all__ = ["Fit", "Plan", "Tokens", "fit", "pack"]

Tokens = tuple[Sequence[int], Sequence[int]]
"""One example: the prompt's tokens and the answer's, the one that ends the turn included."""


@dataclass(frozen=True)
class Plan:
    """How to train."""

    steps: int
    rate: float
    rank: int
    alpha: float
    targets: tuple[str, ...]
    rows: int
    """Rows of a step."""
    length: int
    """Tokens of a row."""
    warm_up: int
    look_every: int
    """Steps between two looks at what is held out."""
    patience: int
    """Looks without a better loss after which it stops."""
    seed: int
    until: float
    """Monotonic time after which no step begins; what is best by then is kept."""


@dataclass(frozen=True)
class Fit:
    """What came of it."""

    adapter: Adapter
    steps: int
    """Of the adapter that was kept."""
    loss_before: float
    """Held out, per token of the answers, of the base."""
    loss: float
    """The same, of the adapter."""


@dataclass
class _Rows:
    """Packed examples, shapes (rows, length); the loss counts where ``weight`` is 1."""

    tokens: NDArray[np.int32]
    segments: NDArray[np.int32]
    places: NDArray[np.int32]
    """(rows, answers): where the token before each token of an answer stands."""
    wanted: NDArray[np.int32]
    """(rows, answers)."""
    weight: NDArray[np.float32]
    """(rows, answers): 0 where there is nothing."""


def pack(examples: Sequence[Tokens], rows: int, length: int) -> Iterator[_Rows]:
    """Put whole examples into rows, each into the first that has room for it, and so many rows together.

    An answer has at most half a row; examples that do not fit into an empty row must not be there.
    """
    room = length // 2
    filled: list[list[Tokens]] = [[] for _ in range(rows)]
    for prompt, answer in examples:
        for row in filled:
            used = sum(len(p) + len(a) for p, a in row)
            answers = sum(len(a) for _, a in row)
            if used + len(prompt) + len(answer) <= length and answers + len(answer) <= room:
                row.append((prompt, answer))
                break
        else:
            yield _packed(filled, rows, length, room)
            filled = [[(prompt, answer)], *([] for _ in range(rows - 1))]
    if filled[0]:
        yield _packed(filled, rows, length, room)


def _packed(filled: Sequence[Sequence[Tokens]], rows: int, length: int, room: int) -> _Rows:
    out = _Rows(
        np.zeros((rows, length), np.int32),
        np.zeros((rows, length), np.int32),
        np.zeros((rows, room), np.int32),
        np.zeros((rows, room), np.int32),
        np.zeros((rows, room), np.float32),
    )
    for row, texts in enumerate(filled):
        at = answers = 0
        for segment, (prompt, answer) in enumerate(texts, start=1):
            whole = [*prompt, *answer]
            out.tokens[row, at : at + len(whole)] = whole
            out.segments[row, at : at + len(whole)] = segment
            here = slice(answers, answers + len(answer))
            out.places[row, here] = at + len(prompt) - 1 + np.arange(len(answer))
            out.wanted[row, here] = answer
            out.weight[row, here] = 1.0
            at += len(whole)
            answers += len(answer)
    return out


def fit(
    base: Base,
    training: Sequence[Tokens],
    held_out: Sequence[Tokens],
    plan: Plan,
    progress: Callable[[dict[str, Any]], None],
) -> Fit:
    """Train an adapter. ``progress`` hears of each step; what it raises ends the training."""
    weights, shape, scale = as_weights(base), base.shape, plan.alpha / plan.rank
    adapter = new_adapter(base, plan.targets, plan.rank, plan.seed)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, plan.rate, plan.warm_up, max(plan.steps, plan.warm_up + 1), plan.rate / 20
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    state = optimiser.init(adapter)

    def loss_of(adapter: Adapter, weights: Any, rows: _Rows) -> tuple[jax.Array, jax.Array]:
        states = hidden(weights, adapter, shape, rows.tokens, rows.segments, scale)
        # The vocabulary is by far the widest map: only places that count go through it.
        states = jnp.take_along_axis(states, rows.places[..., None], axis=1)
        told = jnp.take_along_axis(score(weights, states), rows.wanted[..., None], axis=-1)[..., 0]
        return -jnp.sum(told * rows.weight), jnp.sum(rows.weight)

    @jax.jit
    def step(adapter: Adapter, state: Any, weights: Any, rows: _Rows) -> tuple[Adapter, Any, jax.Array]:
        def mean(adapter: Adapter) -> jax.Array:
            total, count = loss_of(adapter, weights, rows)
            return total / count

        loss, slope = jax.value_and_grad(mean)(adapter)
        updates, state = optimiser.update(slope, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    look_at = jax.jit(loss_of)

    def look(adapter: Adapter) -> float:
        seen = [look_at(adapter, weights, rows) for rows in pack(held_out, plan.rows, plan.length)]
        return float(sum(total for total, _ in seen) / sum(count for _, count in seen))

    before = best_loss = look(adapter)
    progress({"step": 0, "held_out": before})
    best, best_step, misses = adapter, 0, 0
    batches = _for_ever(training, plan)
    for number in range(1, plan.steps + 1):
        begun = time.monotonic()
        adapter, state, loss = step(adapter, state, weights, next(batches))
        said: dict[str, Any] = {"step": number, "loss": float(loss)}
        now = time.monotonic()
        last = number == plan.steps or now + (now - begun) > plan.until
        if number % plan.look_every == 0 or last:
            said["held_out"] = seen = look(adapter)
            if seen < best_loss:
                best, best_step, best_loss, misses = adapter, number, seen, 0
            else:
                misses += 1
        progress(said)
        if last or misses >= plan.patience:
            break
    return Fit(best, best_step, before, best_loss)


def _for_ever(training: Sequence[Tokens], plan: Plan) -> Iterator[_Rows]:
    order, rng = list(training), random.Random(plan.seed)
    while True:
        rng.shuffle(order)
        yield from pack(order, plan.rows, plan.length)


jax.tree_util.register_dataclass(
    _Rows, data_fields=["tokens", "segments", "places", "wanted", "weight"], meta_fields=[]
)
