"""`cxr-ray audit`: who read or changed which study."""

from typing import Annotated

import typer

from cxr_ray.terminal import console, print_json, single_command, table
from serve.store_options import DEFAULT_STORE, AsJson, StoreUrl, opened


def _audit(
    study: Annotated[str | None, typer.Option(help="Study Instance UID [all studies].")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Entries at most.")] = 100,
    json: AsJson = False,
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """List who read or changed studies and histories, the last first."""
    with opened(store) as opened_store:
        accesses = opened_store.accesses(study, limit)
    if json:
        print_json([{**vars(access), "at": access.at.isoformat()} for access in accesses])
        return
    columns = [("when (UTC)", False), ("who", False), ("did", False), ("study or patient", False)]
    shown = table(f"{len(accesses)} accesses", columns)
    for access in accesses:
        whose = access.study_instance_uid or access.patient_id or ""
        shown.add_row(f"{access.at:%Y-%m-%d %H:%M}", access.actor, access.action, whose)
    console.print(shown)


audit = single_command(_audit)
