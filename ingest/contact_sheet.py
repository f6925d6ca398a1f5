"""The contact sheet: 64 radiographs of a dataset, drawn at random, with what the dataset says of them.

People look before they train: a wrong photometric interpretation, a column of labels that has slipped or a folder of lateral
views shows here at a glance, and in no table.
"""

import io

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont
from pyarrow import fs

from cxr_ray.dataset import Manifest
from cxr_ray.findings import names
from cxr_ray.records import pixel_array

CONTACT_SHEET = "contact-sheet.png"
_EDGE = 8
_TILE, _GAP, _LINE = 176, 12, 17
_CAPTION_LINES = 3
_MAX_SHARDS = 16
_COLUMNS = ["pixels", "split", "age_years", "sex", "view", "labels"]
_PAPER, _INK, _FAINT = 255, 20, 110

_SHORT = {
    "Cardiomegaly": "Cardiomeg.",
    "Pleural_Thickening": "Pl. Thick.",
    "Pneumothorax": "Pneumoth.",
    "Consolidation": "Consolid.",
    "Infiltration": "Infiltrat.",
}


def contact_sheet(manifest: Manifest, filesystem: fs.FileSystem, root: str, *, seed: int = 0) -> bytes:
    """Draw a PNG of up to 64 radiographs.

    Parameters
    ----------
    manifest
        The dataset's, whose shards lie below `root`; it must have pixels.
    """
    rows = _draw_rows(manifest, filesystem, root, np.random.default_rng(seed))
    step_x, step_y = _TILE + _GAP, _TILE + _CAPTION_LINES * _LINE + _GAP
    lines = -(-len(rows) // _EDGE)
    header = 2 * _LINE + _GAP
    sheet = Image.new("L", (_EDGE * step_x + _GAP, header + lines * step_y + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    images = sum(split.images for split in manifest.splits.values())
    pen.text((_GAP, _GAP), f"{len(rows)} of {images:,} radiographs, drawn at random", fill=_INK, font=_font(16))
    for number, row in enumerate(rows):
        left, top = _GAP + number % _EDGE * step_x, header + number // _EDGE * step_y
        tile = Image.fromarray(np.asarray(row["pixels"])).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
        sheet.paste(tile, (left, top))
        for line, (text, ink) in enumerate(_caption(row)):
            pen.text((left, top + _TILE + 3 + line * _LINE), _fitting(pen, text), fill=ink, font=_font(13))
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    return content.getvalue()


def _draw_rows(
    manifest: Manifest, filesystem: fs.FileSystem, root: str, random: np.random.Generator
) -> list[dict[str, object]]:
    """Rows from a few shards only, because each costs a reading; larger shards are drawn more often."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    sizes = np.array([shard.rows for shard in shards])
    chosen = random.permutation(len(shards))[:_MAX_SHARDS]
    wanted = min(_EDGE**2, int(sizes[chosen].sum()))
    places = np.repeat(chosen, sizes[chosen])
    counts = np.bincount(random.permutation(places)[:wanted], minlength=len(shards))
    rows: list[dict[str, object]] = []
    for index in np.flatnonzero(counts):
        rows += _some_rows(filesystem, f"{root}/{shards[index].path}", int(counts[index]), random)
    return [rows[index] for index in random.permutation(len(rows))]


def _some_rows(filesystem: fs.FileSystem, path: str, count: int, random: np.random.Generator) -> list[dict[str, object]]:
    with filesystem.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        groups = random.permutation(file.num_row_groups)
        needed, held = 0, 0
        while held < count:
            held += file.metadata.row_group(int(groups[needed])).num_rows
            needed += 1
        table = file.read_row_groups(sorted(int(group) for group in groups[:needed]), columns=_COLUMNS)
    table = table.take(random.permutation(table.num_rows)[:count])
    pixels = pixel_array(table["pixels"])
    return [row | {"pixels": square} for row, square in zip(table.drop_columns("pixels").to_pylist(), pixels, strict=True)]


def _caption(row: dict[str, object]) -> list[tuple[str, int]]:
    age = "age ?" if row["age_years"] is None else f"{row['age_years']:.0f} y"
    about = f"{row['split']}  {age}  {row['sex'] or 'sex ?'}  {row['view'] or 'view ?'}"
    labels = row["labels"]
    if labels is None:
        return [(about, _FAINT), ("no labels", _FAINT)]
    shown = [_SHORT.get(name, name) for name in names(labels)] or ["No Finding"]  # type: ignore[arg-type]
    first, rest = shown[:2], shown[2:]
    further = f"{rest[0]} +{len(rest) - 1}" if len(rest) > 2 else ", ".join(rest)
    return [(about, _FAINT), (", ".join(first), _INK), (further, _INK)]


def _font(points: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(points)


def _fitting(pen: ImageDraw.ImageDraw, text: str) -> str:
    """The text, or as much of its beginning as a tile's width holds."""
    while text and pen.textlength(text, font=_font(13)) > _TILE:
        text = text[:-2].rstrip(" .,") + "…"
    return text
