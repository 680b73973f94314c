"""Time several functions in turn, so that a slow spell of the machine hits all of them."""

import statistics
import time
from collections.abc import Callable


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3, tidy: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call of each function, `rounds` times A B C A B C ...; `tidy` runs after each call, not timed."""
    seconds = {name: [] for name in functions}
    for number in range(warm_up + rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
            tidy()
    return seconds


def report(seconds: dict[str, list[float]], limit: str, per: float = 1.0, unit: str = "calls") -> None:
    """Print the median rate of each, and the median over rounds of its ratio to the function named `limit`."""
    for name, times in seconds.items():
        ratios = [best / own for best, own in zip(seconds[limit], times, strict=True)]
        middle, ratio = statistics.median(times), statistics.median(ratios)
        print(f"  {name:42} {1e3 * middle:9.1f} ms {per / middle:12,.0f} {unit}/s   {ratio:.2f} of the limit")
