"""`cxr-ray predict`: a folder of images into a Parquet file."""

from typing import TYPE_CHECKING

from cxr_ray import storage
from cxr_ray.cpus import available_cpus
from cxr_ray.errors import CxrRayError
from cxr_ray.options import settings_command
from cxr_ray.ray_session import ray_session
from cxr_ray.shared_paths import check_shared
from cxr_ray.terminal import console, print_json, print_settings, table
from serve.batch_settings import PredictSettings

if TYPE_CHECKING:
    from serve.batch import Summary


def _predict(settings: PredictSettings, json: bool) -> None:
    from serve import batch  # noqa: PLC0415 - takes seconds, --help need not wait

    print_settings("predict", settings)
    # Before Ray is started, which takes a while.
    plan = batch.make_plan(settings)
    # The network and the decoders run at the same time, if need be on one CPU.
    with ray_session(local_cpus=max(available_cpus(), settings.workers + 1)):
        read = {"bundle": settings.bundle, "input": settings.input, "clinical": settings.clinical}
        check_shared(read, {"out": settings.out})
        summary = batch.predict(plan)
    if json:
        print_json(_as_json(settings, summary))
    else:
        _show(settings, summary)
    if not summary.answered:
        raise CxrRayError(f"none of the {summary.files} files could be answered; {storage.shown(settings.out)} says why")


def _as_json(settings: PredictSettings, summary: "Summary") -> dict[str, object]:
    return {
        "out": storage.shown(settings.out),
        "files": summary.files,
        "answered": summary.answered,
        "refused": summary.refused,
        "seconds": round(summary.seconds, 3),
        "images_per_second": round(summary.rate, 3),
        "commonest_reasons": [{"reason": why, "files": files} for why, files in summary.commonest()],
    }


def _show(settings: PredictSettings, summary: "Summary") -> None:
    console.print(
        f"{summary.files} files: {summary.answered} answered, {summary.refused} refused "
        f"in {summary.seconds:.1f} s ({summary.rate:.1f} images/s)"
    )
    if summary.refused:
        shown = table("Commonest reasons", [("files", True), ("reason", False)])
        for why, files in summary.commonest():
            shown.add_row(str(files), why)
        console.print(shown)
    console.print(f"written: {storage.shown(settings.out)}")


predict = settings_command(
    PredictSettings,
    _predict,
    "Answer a folder of images at once with Ray Data; the result is a Parquet file with a row for each, bad ones included.",
)
