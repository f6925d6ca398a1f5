"""Tables that users bring as CSV: UTF-8, separated by commas, semicolons or tabulators, errors told by line."""

import csv
import io
from collections.abc import Iterator

from cxr_ray.errors import CxrRayError

_DELIMITERS = ",;\t"


def csv_cells(content: bytes, path: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of the header and of each row that is not blank; cells without the blanks around them.

    Raises
    ------
    CxrRayError
        Naming the file and the line: it is no CSV in UTF-8, or a row has more or fewer cells than the header.
    """
    try:
        text = content.decode("utf-8-sig")
        first = text.partition("\n")[0]
        delimiter = max(_DELIMITERS, key=first.count)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = 0
        for row in rows:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            columns = columns or len(cells)
            if len(cells) != columns:
                raise CxrRayError(
                    f"{path} line {rows.line_num}: has {len(cells)} values under {columns} columns; correct the row"
                )
            yield rows.line_num, cells
    except UnicodeDecodeError as error:
        raise CxrRayError(f"{path}: is no readable CSV ({error.reason} at byte {error.start}); save it in UTF-8") from None
    except csv.Error as error:
        raise CxrRayError(f"{path}: is no readable CSV ({error}); save it as CSV in UTF-8") from None
