"""A comparison as files: Markdown for a paper, CSV and JSON for other programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from cxr_ray import storage
from cxr_ray.comparison import Comparison, NetworkScores
from cxr_ray.comparison_tables import (
    aucs_by_finding,
    difference_text,
    notes,
    p_text,
    parameters_text,
    rate_text,
    reads,
    title,
)
from cxr_ray.findings import FINDINGS
from cxr_ray.preset_words import mark, published_as_json
from cxr_ray.presets.preset import Published
from cxr_ray.report import interval_text
from cxr_ray.resampling import Interval
from cxr_ray.score_tables import csv_text, plain

JSON, CSV, MARKDOWN = "comparison.json", "comparison.csv", "comparison.md"


def write_files(comparison: Comparison, out: str) -> None:
    """Write the three files below a folder or URI, each whole or not at all."""
    filesystem, root = storage.resolve(out)
    filesystem.create_dir(root, recursive=True)
    files = {
        JSON: json.dumps(as_json(comparison), indent=2, allow_nan=False) + "\n",
        CSV: as_csv(comparison),
        MARKDOWN: as_markdown(comparison),
    }
    for name, text in files.items():
        storage.write_atomically(filesystem, f"{root}/{name}", text.encode())


def as_json(comparison: Comparison) -> dict[str, object]:
    """Everything, for machines; what cannot be scored is null."""
    settings, networks = comparison.settings, comparison.networks
    return {
        "data": storage.shown(settings.data),
        "dataset_digest": comparison.dataset_digest,
        "split": settings.split,
        "basis": comparison.basis,
        "images": networks[0].scores.images,
        "patients": networks[0].scores.patients,
        "interval": f"95 % percentile bootstrap, {settings.resamples} resamples of patients",
        "difference": f"AUC less that of {networks[0].name} on the same images; of the mean by the same resamples, two-sided p "
        "not adjusted for several networks; of findings by Obuchowski's covariance, patients as clusters",
        "networks": [_network(network, comparison) for network in networks],
        "left_out": dict(comparison.left_out),
    }


def _network(network: NetworkScores, comparison: Comparison) -> object:
    lead, bundle = network.lead, network.bundle
    above = None if lead is None else {**asdict(lead.mean), "p_value": lead.p_value}
    return plain(
        {
            "name": network.name,
            "bundle": network.uri,
            "digest": bundle.digest,
            "preset": bundle.preset,
            "variant": bundle.variant,
            "reads": reads(network),
            "trained_here": network.trained_here,
            "trained_on_this_dataset": bundle.dataset_digest == comparison.dataset_digest,
            "settings": bundle.settings,
            "parameters": network.parameters,
            "speed": None if network.speed is None else asdict(network.speed),
            "auc": asdict(network.scores.auroc),
            "average_precision": asdict(network.scores.average_precision),
            "difference": above,
            "published": published_as_json(network.published),
            "findings": {name: _finding(network, k) for k, name in enumerate(FINDINGS)},
        }
    )


def _finding(network: NetworkScores, k: int) -> dict[str, object]:
    finding = network.scores.findings[k]
    above = None if network.lead is None else network.lead.findings[k]
    return {
        "images": finding.images,
        "positives": finding.positives,
        "auc": asdict(finding.auroc),
        "average_precision": asdict(finding.average_precision),
        "difference": None if above is None else {**asdict(above.interval), "z": above.z, "p_value": above.p_value},
    }


def as_csv(comparison: Comparison) -> str:
    """A row a network and finding, and one a network of its means; empty cells where nothing could be scored."""
    rows = [row for network in comparison.networks for row in _rows(network, comparison.basis)]
    return csv_text(rows[0], rows)


def _rows(network: NetworkScores, basis: str) -> list[dict[str, object]]:
    lead, scores = network.lead, network.scores
    published = network.published[0] if network.published else None
    rows = []
    for k, name in enumerate(FINDINGS):
        finding, above = scores.findings[k], None if lead is None else lead.findings[k]
        counts = {"finding": name, "images": finding.images, "positives": finding.positives}
        figures = _figures(finding.auroc, None if above is None else above.interval, None if above is None else above.p_value)
        rows.append(_network_cells(network) | counts | figures | _published(published, name) | {"basis": basis})
    counts = {"finding": "mean", "images": scores.images, "positives": ""}
    figures = _figures(scores.auroc, None if lead is None else lead.mean, None if lead is None else lead.p_value)
    rows.append(_network_cells(network) | counts | figures | _published(published, None) | {"basis": basis})
    return rows


def _network_cells(network: NetworkScores) -> dict[str, object]:
    speed = network.speed
    return {
        "network": network.name,
        "preset": network.bundle.preset,
        "variant": network.bundle.variant,
        "reads": reads(network),
        "parameters": network.parameters,
        "images_per_second": None if speed is None else speed.images_per_second,
        "device": None if speed is None else speed.device,
    }


def _figures(auroc: Interval, difference: Interval | None, p_value: float | None) -> dict[str, object]:
    above = (None, None, None) if difference is None else (difference.value, difference.low, difference.high)
    return {
        **dict(zip(("auc", "auc_low", "auc_high"), (auroc.value, auroc.low, auroc.high), strict=True)),
        **dict(zip(("difference", "difference_low", "difference_high"), above, strict=True)),
        "p": p_value,
    }


def _published(published: Published | None, finding: str | None) -> dict[str, object]:
    """The figure of a finding, or for None the mean; with the mark that says who has read it."""
    if published is None:
        return {"published_auc": None, "published_mark": None, "published_split": None}
    auc = published.mean if finding is None else published.auc.get(finding)
    return {"published_auc": auc, "published_mark": mark(published), "published_split": published.split}


def as_markdown(comparison: Comparison) -> str:
    """The table for a paper, what has to be said below it, and the AUCs by finding."""
    networks = comparison.networks
    head = ["network", "reads", "AUC (95 % interval)", "published AUC (split)", "parameters", "images/s"]
    head += [f"difference to {networks[0].name}", "p"] if len(networks) > 1 else []
    names = [network.name for network in networks]
    parts = [
        f"# {title(comparison)}: {comparison.basis}",
        _markdown_table(head, "llrlrrrr", [_markdown_row(network, len(networks) > 1) for network in networks]),
        "\n".join(f"- {line.replace('*', chr(92) + '*')}" for line in notes(comparison)),
        "## AUC by finding",
        _markdown_table(
            ["finding", *names], "l" + "r" * len(names), [[row, *aucs] for row, aucs in aucs_by_finding(comparison)]
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_row(network: NetworkScores, compared: bool) -> list[str]:
    published = "; ".join(
        f"{each.mean:.3f}{mark(each).replace('*', chr(92) + '*')} ({each.split})" for each in network.published
    )
    row = [network.name, reads(network), interval_text(network.scores.auroc), published]
    row += [parameters_text(network.parameters), rate_text(network.speed)]
    if not compared:
        return row
    return row + (["", ""] if network.lead is None else [difference_text(network.lead.mean), p_text(network.lead.p_value)])


def _markdown_table(head: Sequence[str], sides: str, rows: Sequence[Sequence[str]]) -> str:
    rules = ["---:" if side == "r" else "---" for side in sides[: len(head)]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rules, *rows))
