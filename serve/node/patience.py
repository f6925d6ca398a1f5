"""How long to wait before the next attempt: pauses that double, with a random part so that peers are not asked in step."""

import random

from serve.node.destinations import PatienceSettings

LONGEST_RETRY_AFTER = 24 * 3600.0


def pause_seconds(settings: PatienceSettings, failures: int, retry_after: float = 0.0) -> float:
    """The pause after so many failures in a row, 1 or more; never shorter than what the peer asked for, up to a day."""
    # The exponent is bounded, or days of failures overflow it.
    own = min(settings.first_retry_seconds * 2.0 ** min(failures - 1, 32), settings.max_retry_seconds)
    own *= 1 + settings.jitter * random.random()  # noqa: S311 - spreads load, guards nothing
    return max(own, min(retry_after, LONGEST_RETRY_AFTER))
