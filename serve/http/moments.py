"""Days and moments as clients write them: ISO 8601 and nothing else.

Left to itself, pydantic reads "0" as 1 January 1970; a client that sends a number meant something else.
"""

import re
from datetime import date
from typing import Annotated

from pydantic import AwareDatetime, BeforeValidator

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def _day(value: object) -> object:
    if (isinstance(value, str) and not _DAY.fullmatch(value)) or isinstance(value, int | float):
        raise ValueError("a day is written like 2024-05-31")
    return value


def _moment(value: object) -> object:
    if (isinstance(value, str) and not _DAY.match(value)) or isinstance(value, int | float):
        raise ValueError("a moment is written like 2024-05-31T14:30:00Z")
    return value


Day = Annotated[date, BeforeValidator(_day)]
Moment = Annotated[AwareDatetime, BeforeValidator(_moment)]
