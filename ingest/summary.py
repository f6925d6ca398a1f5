"""What an ingest prints at its end: rows and prevalence a split, what was left out and why, and how fast it went."""

import re
from collections import Counter

from rich.table import Table

from cxr_ray import storage
from cxr_ray.dataset import LeftOutImage, Manifest, Split
from cxr_ray.findings import FINDINGS
from cxr_ray.records import SPLITS
from cxr_ray.terminal import console, table
from ingest.contact_sheet import CONTACT_SHEET
from ingest.shards import LEFT_OUT

_MAX_REASONS = 10


def print_summary(out: str, manifest: Manifest) -> None:
    """Print a manifest for a person, within 80 columns."""
    place = storage.shown(out)
    console.print(_splits(f"Dataset {place}", manifest))
    if manifest.left_out:
        console.print(_left_out(manifest.left_out))
        console.print(f"file by file: {place.rstrip('/')}/{LEFT_OUT}")
    counts = "; ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in manifest.counts.items())
    console.print(counts, soft_wrap=False)
    for warning in manifest.warnings:
        console.print(f"warning: {warning}")
    if manifest.size is not None:
        rate = "" if manifest.images_per_second is None else f"{manifest.images_per_second:,.0f} images/s; "
        console.print(f"{rate}look at {place.rstrip('/')}/{CONTACT_SHEET} before you train")


def _splits(title: str, manifest: Manifest) -> Table:
    shown = table(title, [("", False), *((name, True) for name in SPLITS)])
    splits = [manifest.splits[name] for name in SPLITS]
    shown.add_row("images", *(f"{split.images:,}" for split in splits))
    shown.add_row("patients", *(f"{split.patients:,}" for split in splits))
    shown.add_row("with labels", *(f"{split.labelled:,}" for split in splits))
    shown.add_row("shards", *(f"{len(split.shards):,}" for split in splits), end_section=True)
    if any(split.prevalence for split in splits):
        shown.add_row("prevalence", "", "", "")
        _add_prevalence(shown, splits)
    return shown


def _add_prevalence(shown: Table, splits: list[Split]) -> None:
    for name in FINDINGS:
        prevalence = [split.prevalence.get(name) for split in splits]
        shown.add_row(f"  {name}", *("-" if share is None else f"{share:.2%}" for share in prevalence))


def _left_out(entries: list[LeftOutImage]) -> Table:
    """Reasons with their counts, the most frequent first; numbers in them are of one file and say nothing about many."""
    kinds = Counter((entry.refused, _kind(entry.reason)) for entry in entries)
    shown = table("Left out", [("files", True), ("", False), ("reason", False)])
    for (refused, kind), count in kinds.most_common(_MAX_REASONS):
        shown.add_row(f"{count:,}", "refused" if refused else "unreadable", kind)
    further = kinds.total() - sum(count for _, count in kinds.most_common(_MAX_REASONS))
    if further:
        shown.add_row(f"{further:,}", "", f"{len(kinds) - _MAX_REASONS} further reasons")
    return shown


def _kind(reason: str) -> str:
    return re.sub(r"(?<!JPEG )\b\d+([.,x]\d+)*", "#", reason.partition(";")[0])
