"""A comparison on a terminal: tables of eighty columns, and the words that its files share with them.

Published figures always stand with the split that they were taken on, and the title says what our split is to the official one.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from cxr_ray.comparison import Comparison, NetworkScores, left_out_in_words
from cxr_ray.findings import FINDINGS
from cxr_ray.predictions import Speed
from cxr_ray.preset_words import explained, inputs_read, mark
from cxr_ray.presets.preset import Published
from cxr_ray.report import interval_text
from cxr_ray.resampling import Interval
from cxr_ray.terminal import table

_COLUMNS_OF_A_TERMINAL = 80
_LONGEST_NAME = max(map(len, FINDINGS))
# Narrower than this the names of findings cannot be wrapped.
_LONGEST_WORD = max(len(word) for name in FINDINGS for word in name.split("_"))


def networks_table(comparison: Comparison) -> Table:
    """Each network: what it reads, its mean AUC, and what was published about it on which split."""
    columns = [("network", False), ("reads", False), ("AUC (95 % interval)", True)]
    if any(network.published for network in comparison.networks):
        columns += [("published", True), ("on split", False)]
    shown = table(f"{title(comparison)}:\n{comparison.basis.replace(': ', ':' + chr(10))}", columns)
    # A name that is broken is another name; what a network reads may be.
    shown.columns[0].no_wrap = True
    for network in comparison.networks:
        first, *others = network.published or (None,)
        mean = interval_text(network.scores.auroc)
        shown.add_row(*(network.name, reads(network), mean, *_published(first))[: len(columns)])
        for other in others:
            shown.add_row("", "", "", *_published(other))
    return shown


def differences_table(comparison: Comparison) -> Table:
    """Each network: its size, its speed, and its mean AUC less that of the first."""
    columns = [("network", False), ("parameters", True), ("images/s", True)]
    heading = "Size and speed"
    if len(comparison.networks) > 1:
        columns += [("difference", True), ("p", True)]
        heading = f"Size, speed, and mean AUC less that of {comparison.networks[0].name} on the same images"
    shown = table(heading, columns)
    for network in comparison.networks:
        lead = ("", "") if network.lead is None else (difference_text(network.lead.mean), p_text(network.lead.p_value))
        row = (network.name, parameters_text(network.parameters), rate_text(network.speed), *lead)
        shown.add_row(*row[: len(columns)])
    return shown


def findings_table(comparison: Comparison) -> Table | None:
    """AUC of each finding by network, by number where their names are too long; None where a terminal has no room for it."""
    names = [network.name for network in comparison.networks]
    heading, headings = "AUC by finding", names
    if _width(names, _LONGEST_NAME) > _COLUMNS_OF_A_TERMINAL:
        headings = [f"({number})" for number in range(1, len(names) + 1)]
        numbered = ", ".join(map(" ".join, zip(headings, names, strict=True)))
        heading = textwrap.fill(f"{heading}: {numbered}", _COLUMNS_OF_A_TERMINAL)
    if _width(headings, _LONGEST_WORD) > _COLUMNS_OF_A_TERMINAL:
        return None
    shown = table(heading, [("finding", False), *((each, True) for each in headings)])
    for name, aucs in aucs_by_finding(comparison):
        if name == "mean":
            shown.add_section()
        shown.add_row(name, *aucs, style="bold" if name == "mean" else "")
    return shown


def notes(comparison: Comparison) -> list[str]:
    """What has to be said below the tables, a line each."""
    networks, settings = comparison.networks, comparison.settings
    lines = explained(published for network in networks for published in network.published)
    if any(network.published for network in networks):
        lines.append("Published figures of another split, or of images of another size, cannot be compared with ours.")
    speeds = [network.speed for network in networks if network.speed is not None]
    if speeds:
        devices = "; ".join(dict.fromkeys(speed.device for speed in speeds))
        lines.append(
            f"images/s: one process, {devices}, batches of {speeds[0].batch_size}, from pixels in memory to probabilities, "
            "after a first batch; reading the data and loading the network are not included."
        )
    if len(networks) > 1:
        lines.append(
            f"Intervals and p: {settings.resamples:,} resamples of patients, differences paired, p two-sided and not adjusted "
            "for the number of networks."
        )
    if settings.split == "val":
        lines.append("Checkpoints and thresholds were chosen on split val: AUCs on it are too high.")
    lines += [
        f"{network.name} was trained on another dataset: whether it has seen these patients is not known."
        for network in networks
        if network.bundle.dataset_digest != comparison.dataset_digest
    ]
    return lines + [f"{line[0].upper()}{line[1:]}." for line in left_out_in_words(comparison.left_out)]


def title(comparison: Comparison) -> str:
    """On what the networks were scored."""
    scores = comparison.networks[0].scores
    return f"Networks on split {comparison.settings.split}, {scores.images:,} images of {scores.patients:,} patients"


def reads(network: NetworkScores) -> str:
    """What a network reads."""
    size = network.bundle.input_size
    return inputs_read(None if size is None else f"image {size}px", network.bundle.layout)


def difference_text(difference: Interval) -> str:
    """A difference with its interval, such as ``+0.012 (+0.001 to +0.023)``; a dash where there is none."""
    if not np.isfinite(difference.value):
        return "-"
    return f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def p_text(p_value: float) -> str:
    """A p value to three digits."""
    if not np.isfinite(p_value):
        return "-"
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def parameters_text(parameters: int) -> str:
    """A number of parameters, such as ``7.0 M``."""
    return f"{parameters / 1e6:.1f} M" if parameters >= 100_000 else f"{parameters:,}"


def rate_text(speed: Speed | None) -> str:
    """Images a second to three digits, as more are not to be had again; a dash where they were not measured."""
    if speed is None:
        return "-"
    rate = float(f"{speed.images_per_second:.3g}")
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _published(published: Published | None) -> tuple[str, str]:
    return ("", "") if published is None else (f"{published.mean:.3f}{mark(published):<2}", published.split)


def _width(headings: Sequence[str], findings: int) -> int:
    """Columns that the table by finding takes of a terminal, of which `findings` are for their names."""
    return 2 + findings + sum(3 + max(5, len(heading)) for heading in headings)


def aucs_by_finding(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """A row a finding, and one of the means: its name, and the AUC of each network as text."""
    rows = [
        (name.replace("_", " "), [network.scores.findings[k].auroc for network in comparison.networks])
        for k, name in enumerate(FINDINGS)
    ]
    rows.append(("mean", [network.scores.auroc for network in comparison.networks]))
    return [(name, [_figure(auroc.value) for auroc in aurocs]) for name, aurocs in rows]


def _figure(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"
