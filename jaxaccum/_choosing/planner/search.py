"""Finds the largest size that fits, in few trials."""

import bisect
import math
from collections.abc import Callable, Sequence

TRIALS = 6


def largest(sizes: Sequence[int], limit: int, fixed: int, peak: Callable[[int], int | None]) -> int | None:
    """Returns the largest of the ascending `sizes` whose `peak` is at most `limit`; None if the first one's is not.

    `peak` is called at most `TRIALS` times, and returns None for a size that is over the limit by an unknown amount.
    Sizes to try are predicted by a line through two known sizes; a size of 0 takes `fixed`. The result has been tried.
    So has the next size, unless there are more than 32 sizes and the predictions were too far off.
    """
    first = peak(sizes[0])
    if first is None or first > limit:
        return None
    fits, over = [(0, fixed), (sizes[0], first)], None
    low, high = 0, len(sizes)  # Positions of the largest size known to fit and of the smallest known not to.
    for left in range(TRIALS - 2, -1, -1):
        if high - low == 1:
            break
        position = _predicted(sizes, limit, *(fits[-1], over) if over else fits[-2:])
        reach = 2**left  # How far bisection could search after this trial.
        if high - low <= 2 * reach:
            position = min(max(position, high - reach), low + reach)
        position = min(max(position, low + 1), high - 1)
        found = peak(sizes[position])
        if found is not None and found <= limit:
            low = position
            fits.append((sizes[position], found))
        else:
            high, over = position, None if found is None else (sizes[position], found)
    return sizes[low]


def _predicted(sizes: Sequence[int], limit: int, a: tuple[int, int], b: tuple[int, int]) -> int:
    """Returns the position of the largest size within `limit` on the line through two points (size, peak)."""
    slope = (b[1] - a[1]) / (b[0] - a[0])
    size = a[0] + (limit - a[1]) / slope if slope > 0 else math.inf
    return bisect.bisect_right(sizes, size) - 1
