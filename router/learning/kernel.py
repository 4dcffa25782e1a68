"""The arithmetic of a choice and of a score: compiled where there was a compiler, else in numpy.

Both give the same but for rounding, in the last digits; in numpy a choice takes about two and a half times
as long. The C is in ``_kernel.c``, the numpy in :mod:`chainwax.router.learning.plain`.

* ``read(raw, most, mask)`` reads a prompt's bytes, lower case: the hashes (CRC-32, and-ed with ``mask``, two
  bytes each) of its different words, of more than ``most`` the first half and the last; and how many digits,
  lines, symbols and spaces there are.
* ``numbers(context, most, mask)`` gives the numbers in a context, and-ed with ``mask``, as bytes of intp.
  ValueError where it is none, or has more than ``most``.
* ``expect(out, words, table, mean, own, keeps, level, …)`` puts into ``out``, shape (2, arms + 1), the score
  to expect of each arm and the variance of its log-odds' own part. ``words`` are rows of ``table``, shape
  (places, 2, arms + 1); the rest is what two :class:`~chainwax.router.learning.pooled.Pooled` hold, the
  flow's and the node's. What is little known of is expected to be nearer to one half (the logistic's mean
  under a Gaussian; MacKay 1992).
* ``spread(out, mean, doubt, cost, width)`` tells how far each arm's score is drawn from its mean: ``width``
  deviations of the belief, and not at all where it costs no less than the first.
* ``worth(drawn, mean, cost, rows, width, price)`` tells what so many calls, the first rows of arrays of so
  many columns, would come to where each chose the arm with the greatest drawn − cost / price: mean score and
  dollars.
* ``note(drawn, mean, cost, row, width, places, …)`` writes a call into such a row: in the columns ``places``
  what is given last, and of no other arm anything drawn.
* ``best(mean, spread, toll, normals)`` tells which arm is the best by the first row of ``normals``, shape
  (rows, arms), where an arm's worth is mean + spread · normal − toll, and of how many rows it is.
* ``said(table, words, width, place)`` sums what the words say of an arm, in common and by itself: weights
  and variances; ``width`` is arms + 1.
* ``move(table, words, width, place, by, shrink)`` moves each of those weights by its variance times ``by``,
  and takes from the variance v its ``shrink`` · v².
"""

from __future__ import annotations

__all__ = ["COMPILED", "best", "expect", "move", "note", "numbers", "read", "said", "spread", "worth"]

try:
    from chainwax.router.learning._kernel import best, expect, move, note, numbers, read, said, spread, worth

    COMPILED = True
except ImportError:
    from chainwax.router.learning.plain import best, expect, move, note, numbers, read, said, spread, worth

    COMPILED = False
