"""A classifier for one node: hashed words and letters, a logistic regression, and a sense of its own doubt.

Text becomes TF-IDF weights of hashed word pairs and letter n-grams, the larger the more they tell of the
choices; a multinomial logistic regression over them says how likely each choice is, with its temperature set
on data that came after what it was fitted on (Guo et al. 2017). It goes on learning from each right answer
that it is told, by a gradient step.

Where another model's answer differs from its own, a small logistic regression over the two chances, which
forgets, says which of the two to trust. It *abstains* where any other answer could still change its mind.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainwax.router.errors import ConfigError, TrainerFailed

__all__ = ["Doubt", "Guess", "Head", "Texts"]

_LONGEST = 4_000
"""Characters of a text that are looked at; of a longer one its two ends."""
_WORDS = r"(?u)\b\w+\b|[%$+\-]"
_STEP = 0.2
"""Size of the gradient step for one right answer."""
_HALF = 100.0
"""Differences after which one counts half, in what is known of whom to trust."""
_KEPT = 1_000
_PRIOR = np.array([-2.0, 0.5, 0.3])
"""What is thought of whom to trust without any data: a chance of 0.8 of one's own is about even."""
_SAFE = 0.75
"""Chance of one's own answer against any other, from which on nobody else is asked."""


def needs_sklearn() -> None:
    """Raise :class:`ConfigError` where the extra is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ConfigError("the trainer 'head' needs the extra: pip install 'chainwax[head]'") from None


class Texts:
    """From texts to sparse rows. ``size`` is the number of hashed features of each of the two kinds."""

    def __init__(self, size: int, idf: NDArray[np.float32] | None = None) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        common = {"n_features": size, "alternate_sign": False, "norm": None, "dtype": np.float32}
        self.size = size
        self._kinds = (
            HashingVectorizer(ngram_range=(1, 2), token_pattern=_WORDS, **common),
            HashingVectorizer(analyzer="char", ngram_range=(3, 5), **common),
        )
        self.idf = idf
        """Shape (2 · size,)."""

    def fit(self, texts: Sequence[str]) -> Any:
        """Learn how common each feature is; the rows of these texts, shape (texts, 2 · size)."""
        counts = self._counts(texts)
        seen = np.bincount(counts.indices, minlength=counts.shape[1])
        self.idf = (np.log((1 + len(texts)) / (1 + seen)) + 1).astype(np.float32)
        return self._weighted(counts)

    def rows(self, texts: Sequence[str]) -> Any:
        """The rows of texts."""
        return self._weighted(self._counts(texts))

    def _counts(self, texts: Sequence[str]) -> Any:
        from scipy.sparse import hstack

        cut = [t if len(t) <= _LONGEST else t[: _LONGEST // 2] + " " + t[-_LONGEST // 2 :] for t in texts]
        return hstack([kind.transform(cut) for kind in self._kinds], format="csr")

    def _weighted(self, counts: Any) -> Any:
        assert self.idf is not None
        counts.data = (1 + np.log(counts.data)) * self.idf[counts.indices]
        # Words and letters count the same: each has length 1.
        row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        part = 2 * row + (counts.indices >= self.size)
        length = np.sqrt(np.bincount(part, counts.data**2, minlength=2 * counts.shape[0]))
        counts.data = (counts.data / np.maximum(length, 1e-9)[part]).astype(np.float32)
        return counts


def _telling(rows: Any, answers: Sequence[str]) -> NDArray[np.float32]:
    """How much each feature tells of the choices, shape (features,): what it is multiplied with.

    The standard deviation over the choices of the logarithm of how much more common it is with a choice than
    without. So a regression begins where naive Bayes ends, which is better with few texts and short ones
    (Wang and Manning 2012; theirs is for two choices).
    """
    names, which = np.unique(np.asarray(answers), return_inverse=True)
    with_it = 1.0 + rows.T.astype(np.float64) @ np.eye(len(names))[which]
    without = 1.0 + with_it.sum(axis=1, keepdims=True) - with_it
    ratios = np.log(with_it / with_it.sum(axis=0)) - np.log(without / without.sum(axis=0))
    out: NDArray[np.float32] = np.maximum(ratios.std(axis=1), 1e-3).astype(np.float32)
    return out


class Doubt:
    """Whom to trust where two answers differ: the chance that one's own is right, and not the other's."""

    def __init__(self, pairs: Sequence[Sequence[float]] = ()) -> None:
        self.pairs: deque[tuple[float, float, float]] = deque(((a, b, c) for a, b, c in pairs), _KEPT)
        """Chance of one's own answer, of the other's, and whether one's own was right; oldest first."""
        self._weights = _PRIOR
        self._fitted = -1
        self._seen = len(self.pairs)

    def learn(self, own: float, other: float, *, right: bool) -> None:
        """One of two differing answers was right: one's own, or the other."""
        self.pairs.append((own, other, float(right)))
        self._seen += 1

    def trust(self, own: float, other: float) -> float:
        """The chance that one's own answer is the right one of the two."""
        if self._seen - self._fitted >= 5 or self._fitted < 0:
            self._fit()
        return 1.0 / (1.0 + math.exp(-float(self._weights @ _about(own, other))))

    def _fit(self) -> None:
        self._fitted = self._seen
        self._weights = _PRIOR
        if not self.pairs:
            return
        features = np.array([_about(own, other) for own, other, _ in self.pairs])
        right = np.array([r for _, _, r in self.pairs])
        weight = 0.5 ** (np.arange(len(right))[::-1] / _HALF)
        weights = _PRIOR.copy()
        for _ in range(8):  # Newton's steps; the prior has precision 1
            guess = 1.0 / (1.0 + np.exp(-np.clip(features @ weights, -30, 30)))
            slope = features.T @ (weight * (right - guess)) - (weights - _PRIOR)
            curve = (features * (weight * np.maximum(guess * (1 - guess), 1e-4))[:, None]).T @ features
            weights = weights + np.linalg.solve(curve + np.eye(3), slope)
        if np.isfinite(weights).all():
            self._weights = weights


def _about(own: float, other: float) -> NDArray[np.float64]:
    mine, theirs = _odds(own), _odds(other)
    return np.array([1.0, mine - theirs, mine])


def _odds(p: float) -> float:
    p = min(max(p, 1e-3), 1 - 1e-3)
    return math.log(p / (1 - p))


@dataclass(slots=True)
class Guess:
    """What a head thinks of one text."""

    chances: NDArray[np.float64]
    """Of each choice; they sum to 1."""
    top: int
    sure: bool
    """Whether no other answer could change its mind."""


class Head:
    """A fitted classifier: ``weights`` has the shape (2 · size, choices), ``bias`` (choices,)."""

    def __init__(
        self,
        choices: Sequence[str],
        texts: Texts,
        weights: NDArray[np.float32],
        bias: NDArray[np.float64],
        sharpness: float = 1.0,
        doubt: Doubt | None = None,
    ) -> None:
        self.choices = tuple(choices)
        self.texts = texts
        self.weights = weights
        self.bias = bias
        self.sharpness = sharpness
        """What log-odds are multiplied with: the inverse of the temperature."""
        self.doubt = doubt or Doubt()
        self._number = {choice: n for n, choice in enumerate(self.choices)}

    @classmethod
    def fit(
        cls,
        choices: Sequence[str],
        texts: Sequence[str],
        answers: Sequence[str],
        strength: float,
        *,
        start: Head | None = None,
    ) -> Head:
        """Fit on texts and their right answers; ``strength`` is the inverse of the regularisation.

        ``start`` is a head for the same choices to begin from, which is quicker and ends at the same.
        """
        from sklearn.linear_model import LogisticRegression

        size = 2**18 if len(choices) <= 16 else 2**16
        features = Texts(size)
        rows = features.fit(texts)
        used = np.unique(rows.indices)
        # Only features that occur are fitted: a tenth of the time.
        rows = rows[:, used]
        telling = _telling(rows, answers)
        rows.data *= telling[rows.indices]
        fitted = LogisticRegression(C=strength, max_iter=200, warm_start=start is not None)
        if start is not None:
            columns = [start._number[choice] for choice in sorted(set(answers))]
            coef, intercept = (start.weights[used][:, columns] / telling[:, None]).T, start.bias[columns]
            if len(columns) == 2:  # one row says it of both
                coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
            fitted.coef_, fitted.intercept_ = coef, intercept
        fitted.fit(rows, answers)
        number = {choice: n for n, choice in enumerate(choices)}
        weights = np.zeros((2 * size, len(choices)), np.float32)
        # A choice that never was right is not made impossible.
        bias = np.full(len(choices), float(fitted.intercept_.min()) - 3.0)
        coef, intercept = fitted.coef_, fitted.intercept_
        if len(fitted.classes_) == 2:
            coef, intercept = (
                np.vstack([-coef / 2, coef / 2]),
                np.array([-intercept[0] / 2, intercept[0] / 2]),
            )
            bias[:] = intercept.min() - 3.0
        for row, start, name in zip(coef, intercept, fitted.classes_, strict=True):
            weights[used, number[str(name)]] = row * telling
            bias[number[str(name)]] = start
        return cls(choices, features, weights, bias)

    def scores(self, rows: Any) -> NDArray[np.float64]:
        """Log-odds of each choice, shape (texts, choices)."""
        return np.asarray(rows @ self.weights, dtype=np.float64) + self.bias

    def chances(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """The chance of each choice, from :meth:`scores`."""
        scaled = self.sharpness * (scores - scores.max(axis=-1, keepdims=True))
        grown = np.exp(scaled)
        return np.asarray(grown / grown.sum(axis=-1, keepdims=True))

    def calibrate(self, scores: NDArray[np.float64], right: NDArray[np.int64]) -> float:
        """Set the sharpness to fit what was right; the mean log-loss then."""

        def loss(sharpness: float) -> float:
            self.sharpness = sharpness
            p = self.chances(scores)[np.arange(len(right)), right]
            return float(-np.log(np.maximum(p, 1e-9)).mean())

        best = min((loss(s), s) for s in np.exp(np.linspace(math.log(0.3), math.log(5.0), 40)).tolist())
        self.sharpness = best[1]
        return best[0]

    def guess(self, text: str) -> Guess:
        """What it thinks of one text."""
        chances = self.chances(self.scores(self.texts.rows([text])))[0]
        order = np.argsort(chances)
        top, next_best = int(order[-1]), int(order[-2])
        sure = self.doubt.trust(float(chances[top]), float(chances[next_best])) >= _SAFE
        return Guess(chances, top, sure)

    def weigh(self, guess: Guess, said: str | None) -> str:
        """Its own answer or the other's, whichever is more likely right."""
        other = self._number.get(said) if said is not None else None
        own = self.choices[guess.top]
        if other is None or other == guess.top:
            return own
        trust = self.doubt.trust(float(guess.chances[guess.top]), float(guess.chances[other]))
        return own if trust >= 0.5 else self.choices[other]

    def learn(self, text: str, right: str, said: Sequence[str] = ()) -> None:
        """Take a right answer into account, and whether those who ``said`` otherwise were right."""
        number = self._number.get(right)
        if number is None:
            return
        row = self.texts.rows([text])
        chances = self.chances(self.scores(row))[0]
        top = int(np.argmax(chances))
        for other in {self._number[s] for s in said if s in self._number} - {top}:
            if number in (top, other):
                self.doubt.learn(float(chances[top]), float(chances[other]), right=number == top)
        error = -chances
        error[number] += 1.0
        # The row's squared length is 2, so that a step of this size is a part of the whole way.
        step = (_STEP / self.sharpness * error).astype(np.float32)
        self.weights[row.indices] += row.data[:, None] * step
        self.bias += 0.1 * _STEP * error

    # -- files ----------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write ``head.npz`` and ``head.json``: numbers alone, nothing that runs when it is read."""
        used = np.flatnonzero(np.any(self.weights != 0, axis=1))
        idf = self.texts.idf
        assert idf is not None
        # What never occurred has the same weight everywhere.
        usual = float(idf.max())
        rare = np.flatnonzero(idf != usual)
        np.savez_compressed(
            folder / "head.npz",
            used=used.astype(np.int32),
            weights=self.weights[used],
            bias=self.bias,
            rare=rare.astype(np.int32),
            idf=idf[rare],
        )
        about = {
            "choices": self.choices,
            "size": self.texts.size,
            "sharpness": self.sharpness,
            "usual_idf": usual,
            "pairs": list(self.doubt.pairs),
        }
        (folder / "head.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Head:
        """Read what :meth:`save` wrote. Raises :class:`TrainerFailed` where that cannot be read."""
        needs_sklearn()
        try:
            about: Mapping[str, Any] = json.loads((folder / "head.json").read_text(encoding="utf-8"))
            with np.load(folder / "head.npz", allow_pickle=False) as arrays:
                size = int(about["size"])
                weights = np.zeros((2 * size, len(about["choices"])), np.float32)
                weights[arrays["used"]] = arrays["weights"]
                idf = np.full(2 * size, about["usual_idf"], np.float32)
                idf[arrays["rare"]] = arrays["idf"]
                bias = arrays["bias"].astype(np.float64)
            return cls(
                about["choices"], Texts(size, idf), weights, bias, about["sharpness"], Doubt(about["pairs"])
            )
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise TrainerFailed(f"{folder}: no head can be read: {error}") from None
