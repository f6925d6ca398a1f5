"""What commands print: settings at the start, tables a person can read, JSON for machines."""

import json
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cxr_ray.settings import Settings, as_yaml, without_credentials

# Long paths in a log must not be broken at 80 columns, and names in brackets are no markup.
console = Console(soft_wrap=True, highlight=False, markup=False)


# Boxes leave a description twenty columns of a terminal's eighty.
_PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}


def command_group(help_text: str) -> typer.Typer:
    """A Typer application whose errors reach `cxr_ray.console` as they are."""
    return typer.Typer(help=help_text, no_args_is_help=True, **_PLAIN)


def single_command(function: Callable[..., None]) -> typer.Typer:
    """A Typer application of one command without a name of its own."""
    app = typer.Typer(**_PLAIN)
    app.command()(function)
    return app


def print_settings(command: str, settings: Settings) -> None:
    """Print all settings of a command on standard error, where they do not mix with its result; URIs without their secrets."""
    sys.stderr.write(f"# cxr-ray {command}\n{as_yaml(without_credentials(settings))}")


def print_json(value: object) -> None:
    """Print a result for machines."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def table(title: str, columns: list[tuple[str, bool]]) -> Table:
    """A plain table; each column is its heading and whether it holds numbers."""
    made = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=any(heading for heading, _ in columns),
    )
    for heading, numeric in columns:
        made.add_column(heading, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return made
