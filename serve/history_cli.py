"""`cxr-ray history`: what is known of patients' earlier visits."""

from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from cxr_ray.terminal import command_group, console, print_json, table
from serve.store_options import DEFAULT_STORE, AsJson, StoreUrl, opened

app = command_group("What is known of patients' earlier visits, which count when later studies are answered.")


@app.command("import")
def import_history(
    file: Annotated[Path, typer.Argument(help="CSV with patient_id, date, findings (Mass|Nodule, No Finding) and view.")],
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Add confirmed visits from a CSV, all or none; those of the same patient and date are replaced."""
    from serve.history_table import read_history_table  # noqa: PLC0415 - --help need not wait

    visits = read_history_table(file)
    with opened(store) as opened_store:
        written = opened_store.import_history(visits)
    console.print(f"{file}: {written} visits of {len(visits)} patients")


@app.command("show")
def show_history(
    patient_id: Annotated[str, typer.Argument(help="PatientID, as the patient's images have it.")],
    json: AsJson = False,
    store: StoreUrl = DEFAULT_STORE,
) -> None:
    """Show all visits of a patient, confirmed ones and, on other days, what the service answered."""
    with opened(store) as opened_store:
        visits = opened_store.earlier_visits(patient_id, date.max, "both")
    if json:
        known = visits and [{**vars(visit), "visit_date": visit.visit_date.isoformat()} for visit in visits]
        print_json(known)
        return
    if visits is None:
        console.print("nothing is known of this patient's visits")
        return
    shown = table(f"{len(visits)} visits", [("date", True), ("source", False), ("view", False), ("findings", False)])
    for visit in visits:
        shown.add_row(f"{visit.visit_date}", visit.source, visit.view or "", ", ".join(visit.findings) or "No Finding")
    console.print(shown)
