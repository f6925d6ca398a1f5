"""Operating thresholds that somebody states in place of a bundle's own."""

from collections.abc import Mapping

from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS


def checked_thresholds(thresholds: Mapping[str, object]) -> dict[str, float]:
    """Thresholds by finding.

    Raises
    ------
    CxrRayError
        If a finding is not known, or a threshold not between 0 and 1.
    """
    for name, value in thresholds.items():
        if name not in FINDINGS:
            raise CxrRayError(f"thresholds: finding {name!r} is not known; use {', '.join(FINDINGS)}")
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise CxrRayError(f"thresholds: {name} is {value!r}; give a probability between 0 and 1")
    return {name: float(value) for name, value in thresholds.items()}  # type: ignore[arg-type]
