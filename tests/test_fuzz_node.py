"""A short campaign of `bench/fuzz_node.py`: 500 associations that break the protocol, and honest peers between them."""

import sys

import pytest
from conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "bench"))

import fuzz_node

pytestmark = pytest.mark.system


def test_listener_survives_a_seeded_campaign() -> None:
    result = fuzz_node.run(associations=500, seed=11, workers=8)
    assert fuzz_node.problems(result) == []
    assert result["associations"] == 500
    assert result["honest"] > 60
    assert len(result["kinds"]) == len(fuzz_node.KINDS)
    # Some were understood and refused, some were broken: each way is taken.
    assert {"abort", "response", "close"} <= set(result["answers"])


def test_campaign_that_failed_is_told() -> None:
    state = {"rss_mib": 80.0, "peak_mib": 80.0, "threads": 3, "descriptors": 4}
    result = {
        "alive": False,
        "honest_failed": ["OSError"],
        "honest_missing": 1,
        "left_in_incoming": 1,
        "before": state,
        "after": {name: value + 100 for name, value in state.items()},
        "tracebacks": 1,
        "failures_in_log": 0,
    }
    assert len(fuzz_node.problems(result)) == 8
