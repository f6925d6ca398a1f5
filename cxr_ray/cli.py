"""`cxr-ray train`, `cxr-ray evaluate` and `cxr-ray bundle`."""

from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Annotated

import typer

from cxr_ray import storage
from cxr_ray.dataset import Dataset
from cxr_ray.errors import UsageError
from cxr_ray.evaluate_settings import EvaluateSettings
from cxr_ray.options import settings_command
from cxr_ray.progress import ProgressReport
from cxr_ray.ray_session import ray_session
from cxr_ray.shared_paths import check_shared
from cxr_ray.terminal import command_group, console, print_json, print_settings, table
from cxr_ray.train_settings import TrainSettings
from cxr_ray.tune_settings import TuneSettings

if TYPE_CHECKING:
    from cxr_ray.bundle import BundleDescription
    from cxr_ray.tuning import Trial

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _train(settings: TrainSettings, json: bool) -> None:
    from cxr_ray.distributed import train as train_preset  # noqa: PLC0415 - takes seconds, --help need not wait
    from cxr_ray.recipe import check_data, resolve  # noqa: PLC0415
    from cxr_ray.training_view import TrainingView  # noqa: PLC0415

    settings = resolve(settings)
    print_settings("train", settings)
    # Before Ray is started, which takes a while, and only then looks.
    check_data(settings, Dataset(settings.data))
    with ray_session(), ProgressReport("train", 0, "images") as progress:
        weights = None if settings.init in {"random", "imagenet"} else settings.init
        check_shared({"data": settings.data, "init": weights}, {"out": settings.out})
        description = train_preset(settings, TrainingView(progress, settings.epochs))
    bundle_uri = storage.shown(storage.child(settings.out, "bundle"))
    if json:
        print_json({"bundle": bundle_uri, "digest": description.digest, "validation": description.validation})
        return
    console.print(
        f"bundle {bundle_uri}: validation AUC {description.validation['auc']:.3f} (epoch {description.validation['epoch']})"
    )
    console.print(f"next: cxr-ray evaluate --bundle {bundle_uri} --data {storage.shown(settings.data)}")


def _evaluate(settings: EvaluateSettings, json: bool) -> None:
    from cxr_ray.bundle import read_description  # noqa: PLC0415
    from cxr_ray.completeness import comparable  # noqa: PLC0415
    from cxr_ray.evaluation import evaluate as evaluate_bundle  # noqa: PLC0415
    from cxr_ray.report import ablations_table, history_table, localisation_table, scores_table, subgroups_table  # noqa: PLC0415

    print_settings("evaluate", settings)
    # Before Ray is started, as above.
    read_description(settings.bundle)
    Dataset(settings.data)
    with ray_session():
        read = {name: getattr(settings, name) for name in ("bundle", "data", "prevalence", "boxes")}
        check_shared(read, {"out": settings.out, "scores": settings.scores})
        evaluation = evaluate_bundle(settings)
    if json:
        print_json(evaluation.to_json())
        return
    published = comparable(evaluation.bundle, evaluation.extent)
    console.print(scores_table(evaluation.title_in_lines, evaluation.scores, published.auc if published else None))
    if evaluation.subgroups:
        console.print(subgroups_table(f"Subgroups of {settings.split}: mean AUC", evaluation.subgroups))
    if evaluation.ablations:
        console.print(
            ablations_table(f"Ablations on {settings.split}: mean AUC", evaluation.scores.auroc, evaluation.ablations)
        )
    if evaluation.history is not None:
        console.print(history_table("Mean AUC with earlier reports missing", evaluation.history))
    if evaluation.localisation is not None:
        console.print(localisation_table("Radiologists' boxes that hold their heatmap's maximum", evaluation.localisation))
    if settings.out is not None:
        console.print(f"written to {storage.shown(settings.out)}: report.html, evaluation.json, tables as CSV, roc.png")
    if settings.card:
        console.print(f"written: the model card of {storage.shown(settings.bundle)}")
    if settings.scores is not None:
        console.print(f"written: {storage.shown(settings.scores)}")


def _tune(settings: TuneSettings, json: bool) -> None:
    from cxr_ray.tuning import BEST, search  # noqa: PLC0415

    print_settings("tune", settings)
    Dataset(settings.data)
    with ray_session(), ProgressReport("tune", settings.trials * settings.epochs, "epochs") as progress:
        check_shared({"data": settings.data}, {"out": settings.out})

        def watch(trial: str, epoch: int, auc: float) -> None:
            progress.advance(1)
            progress.say(f"trial {trial}, epoch {epoch}/{settings.epochs}: AUC {auc:.3f}")

        trials = search(settings, watch)
    if json:
        print_json([{**asdict(trial), "val_auc": trial.val_auc if isfinite(trial.val_auc) else None} for trial in trials])
        return
    console.print(_trials_table(trials))
    console.print(f"next: cxr-ray train --config {storage.shown(storage.child(settings.out, BEST))}")


def _trials_table(trials: "list[Trial]") -> object:
    names = list(trials[0].drawn)
    columns = [("trial", False), *((name, True) for name in names), ("epochs", True), ("validation AUC", True)]
    shown = table("Trials, the best first", columns)
    for trial in trials:
        drawn = (f"{value:.2g}" if isinstance(value := trial.drawn[name], float) else str(value) for name in names)
        auc = "failed" if trial.error else "-" if not isfinite(trial.val_auc) else f"{trial.val_auc:.3f}"
        shown.add_row(trial.name, *drawn, str(trial.epochs), auc)
    return shown


train = settings_command(TrainSettings, _train, "Train a preset on a dataset with Ray Train; the result is a bundle.")
tune = settings_command(
    TuneSettings, _tune, "Search for good training settings with Ray Tune: start trainings, stop the poor ones early (ASHA)."
)
evaluate = settings_command(
    EvaluateSettings,
    _evaluate,
    "Score a bundle on the untouched test split: AUC a finding and mean, with patient-clustered intervals.",
)
bundle = command_group("Look at a bundle, or export it.")

BundleUri = Annotated[str, typer.Argument(help="Folder or URI of the bundle.")]


@bundle.command()
def show(uri: BundleUri, json: Json = False) -> None:
    """What a bundle holds: preset, training, validation, thresholds."""
    from cxr_ray.bundle import read_description  # noqa: PLC0415

    description = read_description(uri)
    if json:
        print_json(description.model_dump(mode="json"))
        return
    console.print(_bundle_table(description))


def _bundle_table(description: "BundleDescription") -> object:
    shown = table(f"{description.name} {description.version}", [("", False), ("", False)])
    for name, value in (
        ("digest", description.digest),
        ("created", f"{description.created:%Y-%m-%d %H:%M} UTC"),
        ("inputs", description.inputs_in_words()),
        ("validation AUC", f"{description.validation.get('auc', float('nan')):.3f}"),
        ("dataset manifest", description.dataset_digest),
        ("thresholds", ", ".join(f"{name} {value:.3f}" for name, value in description.thresholds.items())),
    ):
        shown.add_row(name, value)
    return shown


@bundle.command()
def verify(uri: BundleUri) -> None:
    """Check a bundle's digests, shapes and weights, as loading does."""
    from cxr_ray.bundle import load_bundle  # noqa: PLC0415

    description = load_bundle(uri).description
    console.print(f"{storage.shown(uri)}: intact, {description.name} {description.version}, digest {description.digest}")


@bundle.command()
def export(
    uri: BundleUri,
    form: Annotated[str, typer.Option("--format", help="onnx, openvino or torch-export.")],
    out: Annotated[str, typer.Option(help="Folder or URI that the model and its export.json are written to.")],
    json: Json = False,
) -> None:
    """Write a bundle's network for other runtimes, once it has given the same answers there."""
    from cxr_ray.bundle import load_bundle  # noqa: PLC0415
    from cxr_ray.export import FORMATS  # noqa: PLC0415
    from cxr_ray.export import export as export_bundle  # noqa: PLC0415

    if form not in FORMATS:
        raise UsageError(f"format {form!r} is not known; use one of: {', '.join(FORMATS)}")
    loaded = load_bundle(uri)
    exported = export_bundle(loaded, form, out)
    if json:
        print_json({"out": storage.shown(out), "files": exported.files, "largest_difference": exported.difference})
        return
    console.print(f"written to {storage.shown(out)}: {', '.join(exported.files)}")
    console.print(f"its answers to the bundle's probe differ by {exported.difference:.2g} at most")
