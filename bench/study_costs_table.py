"""What a unit cost is, how seconds of one are taken, and the table that costs are printed in."""

import time
from collections.abc import Callable

from measuring import say

Cost = tuple[str, str, str]


def print_costs(part: str, costs: list[Cost], begun: str) -> None:
    say(f"\n**{part.capitalize()}.** {begun}\n\n| cost | value | taken as |\n|---|---|---|")
    for cost in costs:
        say(f"| {' | '.join(cost)} |")


def best_seconds(work: Callable[[], object], times: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """The best of some times: what others do on the machine only adds."""
    taken = []
    for _ in range(times):
        began = clock()
        work()
        taken.append(clock() - began)
    return min(taken)
