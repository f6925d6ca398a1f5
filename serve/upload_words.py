"""What an answer says of values that contradict each other."""

# An age in years is rounded down in a header; two ages of one person on one day may differ by a little.
_YEARS_APART = 1.5


def age_conflict(stated: float | None, in_header: float | None) -> list[str]:
    """A warning where a client states another age than the DICOM header; none where they agree, or one says nothing."""
    if stated is None or in_header is None or abs(stated - in_header) < _YEARS_APART:
        return []
    return [f"age: {stated:g} years were stated and the DICOM header says {in_header:g}; the stated age was used"]
