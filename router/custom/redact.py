"""What is taken out of a text before a model is trained on it."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["Redactor", "redact"]

Redactor = Callable[[str], str]
"""From a text to the same text without what no model may learn."""

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
        ),
        "[key]",
    ),
    # The makers' own prefixes: OpenAI, Anthropic, AWS, GitHub, GitLab, Slack, Google, Stripe, Hugging Face.
    (
        re.compile(
            r"\b(?:sk-[\w-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_\w{20,}|github_pat_\w{20,}|"
            r"glpat-[\w-]{16,}|xox[abeoprs]-[\w-]{10,}|AIza[\w-]{30,}|[rs]k_(?:live|test)_\w{10,}|hf_\w{20,})"
        ),
        "[key]",
    ),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{4,}"), "[token]"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{12,}"), r"\1 [token]"),
    (
        re.compile(
            r"(?i)\b(pass(?:word|wd|phrase)?|pwd|secret|api[_ -]?key|access[_ -]?key|auth[_ -]?token|token)"
            r"(\s*(?:[:=]|\bis\b)\s*)[\"']?[^\s\"',;]{4,}[\"']?"
        ),
        r"\1\2[secret]",
    ),
    # A password inside an address.
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://[^\s:/@]{1,100}):[^\s@/]{1,100}@"), r"\1:[secret]@"),
    (re.compile(r"(?i)\b[\w.+-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}\b"), "[email]"),
)
_DIGITS = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?!\w|\.\d)")


def redact(text: str) -> str:
    """Take out private keys, API keys, tokens, passwords, e-mail addresses and card numbers.

    What stands in their place says what was there, so that a model may still learn that it was.

    >>> redact("mail ann@example.org, the password is hunter22")
    'mail [email], the password is [secret]'
    """
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return _DIGITS.sub(lambda found: "[card]" if _luhn(found[0]) else found[0], text)


def _luhn(number: str) -> bool:
    """Whether the digits have a card number's check digit."""
    digits = [int(d) for d in number if d.isdigit()][::-1]
    return sum(d if i % 2 == 0 else d * 2 - 9 * (d > 4) for i, d in enumerate(digits)) % 10 == 0
