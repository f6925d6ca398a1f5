"""What came of a campaign, as a table of 80 columns."""

from chaos_campaign import Outcome
from rich.console import Console
from rich.table import Table

_COLUMNS = 80
_SHOWN = 8


def show(outcome: Outcome) -> None:
    """Print it: what was done, what came of it, and whether that balances."""
    # A terminal or a file, the width is that of a document.
    console = Console(width=_COLUMNS, highlight=False, soft_wrap=False)
    options = outcome.options
    table = Table(
        title=f"{options.studies} studies, {outcome.kills} kills, {options.store}, seed {options.seed}", width=_COLUMNS
    )
    table.add_column("", ratio=1)
    table.add_column("count", justify="right")
    for name, count in outcome.faults.items():
        table.add_row(name, f"{count:,}")
    for name, reason in outcome.skipped.items():
        table.add_row(f"{name}: skipped ({reason})", "0")
    table.add_section()
    for name, count in outcome.account.counts.items():
        table.add_row(name, f"{count:,}")
    table.add_section()
    for status, count in sorted(outcome.letters.items()):
        table.add_row(f"dead letters of images, by status of the service: {status}", f"{count:,}")
    for name, count in outcome.notes.items():
        table.add_row(name, f"{count:,}")
    for name, (before, after) in outcome.held.items():
        table.add_row(f"{name}: descriptors, at the start and at the end", f"{before.descriptors} / {after.descriptors}")
        table.add_row(f"{name}: threads", f"{before.threads} / {after.threads}")
        table.add_row(f"{name}: memory, MiB", f"{before.memory_mib:.0f} / {after.memory_mib:.0f}")
    table.add_row("minutes", f"{outcome.seconds / 60:.1f}")
    table.add_section()
    for name, found in outcome.account.problems.items():
        table.add_row(f"[bold]{name}[/bold]", f"[bold]{len(found):,}[/bold]")
    console.print(table)
    for name, found in outcome.account.problems.items():
        for problem in found[:_SHOWN]:
            console.print(f"{name}: {problem}", markup=False)
        if len(found) > _SHOWN:
            console.print(f"{name}: and {len(found) - _SHOWN} more")
    console.print("The account balances." if outcome.account.balances else "The account does not balance.")
