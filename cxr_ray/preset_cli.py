"""`cxr-ray presets`: the networks, where they come from, and what was published about them."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cxr_ray.preset_words import explained, inputs_read, mark, published_as_json
from cxr_ray.terminal import console, print_json, single_command, table

if TYPE_CHECKING:
    from cxr_ray.presets.preset import Preset, Published


def _presets(
    name: Annotated[str | None, typer.Argument(help="A preset, to see all that is known about it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """List the presets with their published figures, or show one of them in full."""
    from cxr_ray.presets import PRESETS, find  # noqa: PLC0415 - takes seconds, --help need not wait

    chosen = list(PRESETS.values()) if name is None else [find(name)]
    if json:
        print_json([_as_json(preset) for preset in chosen])
    elif name is None:
        console.print(_overview(chosen))
        _explain_marks(chosen)
        console.print("AUCs of different splits cannot be compared. 'cxr-ray presets NAME' shows one in full.")
    else:
        _show(chosen[0])


presets = single_command(_presets)


def _overview(listed: "list[Preset]") -> Table:
    shown = table("", [("preset", False), ("reads", False), ("px", True), ("published on", False), ("AUC", True)])
    for preset in listed:
        first, *others = preset.published or (None,)
        size = "" if preset.published_size is None else str(preset.published_size)
        shown.add_row(preset.name, _reads(preset), size, *_figures(first))
        for other in others:
            shown.add_row("", "", "", *_figures(other))
    return shown


def _reads(preset: "Preset") -> str:
    return inputs_read("image" if preset.reads_images else None, preset.layout)


def _figures(published: "Published | None") -> tuple[str, str]:
    if published is None:
        return "nothing yet", ""
    return published.split, f"{published.mean:.3f}{mark(published):<2}"


def _explain_marks(listed: "list[Preset]") -> None:
    for line in explained(published for preset in listed for published in preset.published):
        console.print(line)


def _show(preset: "Preset") -> None:
    from cxr_ray.presets import build, options  # noqa: PLC0415

    facts = table(preset.name, [("", False), ("", False)])
    facts.add_row("network", preset.summary)
    facts.add_row("source", preset.source)
    facts.add_row("reads", _reads(preset))
    if preset.reads_images:
        said = "as published" if preset.published else "meant"
        facts.add_row("pixels", f"{preset.published_size} {said}, at least {preset.smallest_size}")
    facts.add_row("variants", ", ".join(preset.variants))
    facts.add_row("parameters", f"{build(preset.name).trainable_parameters:,} ({options(preset).variant})")
    facts.add_row("recipe", ", ".join(f"{name} {value}" for name, value in preset.recipe.items()) or "the general defaults")
    for assumption in preset.assumed:
        facts.add_row("assumed", assumption)
    console.print(facts)
    if preset.published:
        console.print(_auc_table(preset))
        for number, published in enumerate(preset.published, start=1):
            console.print(f"({number}) {published.split}{mark(published)}")
        _explain_marks([preset])


def _auc_table(preset: "Preset") -> Table:
    columns = [(f"({number}){mark(published)}", True) for number, published in enumerate(preset.published, start=1)]
    shown = table("Published AUCs", [("finding", False), *columns])
    names = {name: None for published in preset.published for name in published.auc}
    for name in names:
        figures = (published.auc.get(name) for published in preset.published)
        shown.add_row(name.replace("_", " "), *("" if auc is None else f"{auc:.3f}" for auc in figures))
    shown.add_section()
    shown.add_row("mean", *(f"{published.mean:.3f}" for published in preset.published), style="bold")
    return shown


def _as_json(preset: "Preset") -> dict[str, object]:
    return {
        "name": preset.name,
        "summary": preset.summary,
        "source": preset.source,
        "pixels": preset.published_size,
        "smallest_pixels": preset.smallest_size,
        "variants": list(preset.variants),
        "encoding": preset.layout.encoding,
        "meta": preset.layout.meta,
        "history": preset.layout.history,
        "recipe": dict(preset.recipe),
        "assumed": list(preset.assumed),
        "published": published_as_json(preset.published),
    }
