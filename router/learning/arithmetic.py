"""Sums that an answer states, and whether they add up.

Only what is plain is judged: numbers, ``+ − × ÷``, an equals sign and a number. What stands beside a
variable, a bracket or a power is left alone, and so is what has two readings (a percentage added to a
number); where a dot may be a decimal point or part thousands, either reading will do. Rounding to the
decimals that are shown is right, and so is a whole number for a division with a remainder.
"""

from __future__ import annotations

import math
import re

__all__ = ["sums"]

_MOST = 50
"""Equals signs that are looked at."""
_BEFORE, _AFTER = 120, 40
"""Characters around one that are looked at."""

_NUMBER = r"(?:[$€£]\s?)?(?:\d{1,3}(?:,\d{3}){1,4}|\d{1,15})(?:\.\d{1,10})?(?:\s?%)?"
_SIGN = r"(?:\s*[-+−*/×·⋅÷]\s*|\s+[xX]\s+)"
_TERM = re.compile(_NUMBER)
_LEFT = re.compile(rf"(?P<sum>(?:[-−]\s?)?{_NUMBER}(?:{_SIGN}{_NUMBER}){{1,8}})\s*$")
_RIGHT = re.compile(rf"\s*(?P<result>(?:[-−]\s?)?{_NUMBER})")
_OPERATOR = re.compile(r"\s*([-+−*/×·⋅÷xX])\s*")
_LONGER = re.compile(
    r"[\w.,:)\]}^!]$|\d\s$|[)\]}^*/×·⋅÷+−–-]\s*$|\b[b-zB-HJ-Z]\s*$|\b(?:mod|log|ln|sin|cos|tan|sqrt|exp|root|of|over|times|plus|minus)\s*$"
)
"""What before a sum makes it the tail of something longer: an operator, a bracket, a variable, a function."""
_NOT_AFTER = re.compile(r"\s\d{3}|\s*[-+−*/×·⋅÷^=({\[]|[\w]|[.,]\d|\s*[xX]\b")
_SIGNS = {"−": "-", "×": "*", "·": "*", "⋅": "*", "x": "*", "X": "*", "÷": "/"}


def sums(text: str) -> tuple[int, int]:
    """How many sums in the text are right, and how many are wrong.

    >>> sums("3 boxes of 4 cost 3 * 4 = 12, and 12 + 1,200 = 1,312.")
    (1, 1)
    >>> sums("so 2x + 3 - 1 = 7, and 10 / 3 = 3.33")
    (1, 0)
    """
    right = wrong = 0
    at = -1
    for _ in range(_MOST):
        at = text.find("=", at + 1)
        if at < 0:
            break
        holds = _holds(text[max(0, at - _BEFORE) : at], text[at + 1 : at + 1 + _AFTER])
        if holds is True:
            right += 1
        elif holds is False:
            wrong += 1
    return right, wrong


def _holds(before: str, after: str) -> bool | None:
    """Whether the sum around an equals sign is right; None where it is not one to be judged."""
    left, right = _LEFT.search(before), _RIGHT.match(after)
    if left is None or right is None or _NOT_AFTER.match(after, right.end()):
        return None
    if _LONGER.search(before[: left.start()]):
        return None
    said, result = left["sum"], right["result"]
    if "%" in said + result and re.search(r"[-+−]", said.lstrip("-− ")):
        return None
    readings = [_value(said, result, dots=False)]
    if re.search(r"\.\d{3}(?!\d)", said + result):
        readings.append(_value(said, result, dots=True))
    known = [holds for holds in readings if holds is not None]
    return any(known) if known else None


def _value(said: str, result: str, *, dots: bool) -> bool | None:
    numbers = [_number(n, dots=dots) for n in _TERM.findall(said)]
    first = said.lstrip()
    signs = _OPERATOR.findall(_TERM.sub("", said))
    if first[0] in "-−":
        numbers[0] = -numbers[0]
        signs = signs[1:]
    if len(signs) != len(numbers) - 1:
        return None
    total, product = 0.0, numbers[0]
    divided = False
    for sign, number in zip(signs, numbers[1:], strict=True):
        sign = _SIGNS.get(sign, sign)
        if sign == "*":
            product *= number
        elif sign == "/":
            if number == 0:
                return None
            product /= number
            divided = True
        else:
            total += product
            product = number if sign == "+" else -number
    total += product
    claimed = _number(result.lstrip("-− "), dots=dots)
    if result.lstrip()[0] in "-−":
        claimed = -claimed
    shown = result.strip(" %$€£")
    decimals = 0 if dots or "." not in shown else len(shown.rpartition(".")[2])
    slack = 0.5 * 10.0**-decimals * (0.01 if "%" in result else 1.0)
    if not divided and decimals == 0 and all(n == int(n) for n in (*numbers, claimed)):
        slack = 0.0  # whole numbers have nothing to round
    near = abs(total - claimed) <= slack + 1e-9 * max(1.0, abs(total))
    return near or (divided and math.floor(total) == claimed)


def _number(text: str, *, dots: bool) -> float:
    plain = text.strip(" $€£").replace(",", "")
    part = plain.endswith("%")
    plain = plain.rstrip("% ")
    if dots and re.fullmatch(r"\d{1,3}\.\d{3}", plain):
        plain = plain.replace(".", "")
    return float(plain) / (100.0 if part else 1.0)
