"""`cxr-ray compare`: Table 1 of a paper."""

import sys

from cxr_ray import storage
from cxr_ray.compare_settings import CompareSettings
from cxr_ray.options import settings_command
from cxr_ray.ray_session import ray_session
from cxr_ray.shared_paths import check_shared
from cxr_ray.terminal import console, print_json, print_settings


def _compare(settings: CompareSettings, json: bool) -> None:
    from cxr_ray.comparison import compare as compare_networks  # noqa: PLC0415 - takes seconds, --help need not wait
    from cxr_ray.comparison_files import CSV, JSON, MARKDOWN, as_json, write_files  # noqa: PLC0415
    from cxr_ray.comparison_plan import make_plan  # noqa: PLC0415
    from cxr_ray.comparison_tables import differences_table, findings_table, networks_table, notes  # noqa: PLC0415

    print_settings("compare", settings)
    # Before Ray is started, which takes a while, and the first network trained, which takes hours.
    plan = make_plan(settings)
    with ray_session():
        bundles = {f"bundles {name}": uri for name, uri in (settings.bundles or {}).items()}
        check_shared({"data": settings.data, **bundles}, {"out": settings.out})
        comparison = compare_networks(plan, _tell)
    write_files(comparison, settings.out)
    if json:
        print_json(as_json(comparison))
        return
    console.print(networks_table(comparison))
    console.print(differences_table(comparison))
    by_finding = findings_table(comparison)
    if by_finding is not None:
        console.print(by_finding)
    for note in notes(comparison):
        console.print(note, soft_wrap=False)
    console.print(f"written to {storage.shown(settings.out)}: {JSON}, {CSV}, {MARKDOWN}")


def _tell(line: str) -> None:
    """On standard error, where it does not mix with the result."""
    sys.stderr.write(f"compare: {line}\n")
    sys.stderr.flush()


compare = settings_command(
    CompareSettings,
    _compare,
    "Train several presets on a dataset, score them on the same images and print the table of a paper. The same command again "
    "goes on where it was interrupted.",
)
