"""`cxr-ray train`, `cxr-ray evaluate` and `cxr-ray bundle`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cxr_ray.dataset import Dataset
from cxr_ray.progress import ProgressReport
from cxr_ray.ray_session import ray_session
from cxr_ray.settings import load_settings
from cxr_ray.terminal import command_group, console, print_json, print_settings, single_command, table

if TYPE_CHECKING:
    from cxr_ray.bundle import BundleDescription

Config = Annotated[Path | None, typer.Option(help="YAML file with settings; flags override it.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _train(
    data: Annotated[str | None, typer.Option(help="Dataset that 'cxr-ray ingest' wrote.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder or URI of the run; the bundle goes to OUT/bundle.")] = None,
    preset: Annotated[str | None, typer.Option(help="Network [multi-input].")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Clinical inputs: paper (17 numbers) or none (image alone) [paper].")
    ] = None,
    init: Annotated[str | None, typer.Option(help="random, imagenet, or a bundle or weights file [random].")] = None,
    workers: Annotated[int | None, typer.Option(help="Training processes (DDP) [1].")] = None,
    gpu: Annotated[bool | None, typer.Option("--gpu", help="Give each worker a GPU.")] = None,
    cpus_per_worker: Annotated[float | None, typer.Option(help="Logical CPUs reserved for a worker [0.5].")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split [10].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step, over all workers [32].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW [0.001].")] = None,
    head_rate: Annotated[float | None, typer.Option(help="Rate of the layers after the backbone, as a multiple [10].")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay; 0 turns it off [0.01].")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the run in which the rate rises [0.1].")] = None,
    augment: Annotated[float | None, typer.Option(help="Strength of augmentation; 0 turns it off [1].")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 or float32 [bf16].")] = None,
    select: Annotated[
        str | None, typer.Option(help="Checkpoint that becomes the bundle: best (by validation AUC) or last [best].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and augmentation [0].")] = None,
    shuffle_buffer: Annotated[int | None, typer.Option(help="Images among which the next is drawn [2048].")] = None,
    max_failures: Annotated[int | None, typer.Option(help="Lost workers to survive [3].")] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Go on with the run that OUT holds.")] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Train a preset on a dataset with Ray Train; the result is a bundle."""
    flags = {name: value for name, value in locals().items() if name not in ("config", "json")}
    from cxr_ray.training import TrainSettings  # noqa: PLC0415 - takes seconds, --help need not wait

    settings = load_settings(TrainSettings, config, flags)
    print_settings("train", settings)
    # Before Ray is started, which takes a while, and only then looks.
    Dataset(settings.data).require_pixels()
    from cxr_ray.distributed import show_training  # noqa: PLC0415
    from cxr_ray.distributed import train as train_preset  # noqa: PLC0415

    with ray_session(), ProgressReport("train", 0, "images") as progress:
        description = train_preset(settings, lambda event: show_training(event, progress, settings.epochs))
    bundle_uri = f"{settings.out.rstrip('/')}/bundle"
    if json:
        print_json({"bundle": bundle_uri, "digest": description.digest, "validation": description.validation})
        return
    console.print(
        f"bundle {bundle_uri}: validation AUC {description.validation['auc']:.3f} (epoch {description.validation['epoch']})"
    )
    console.print(f"next: cxr-ray evaluate --bundle {bundle_uri} --data {settings.data}")


def _evaluate(
    bundle: Annotated[str | None, typer.Option(help="Folder or URI of the bundle.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder or URI of the dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="train, val or test [test].")] = None,
    out: Annotated[str | None, typer.Option(help="Folder or URI for evaluation.json and roc.png.")] = None,
    withhold: Annotated[
        str | None, typer.Option(help="nothing, or clinical: age, sex, view, history unknown [nothing].")
    ] = None,
    resamples: Annotated[int | None, typer.Option(help="Bootstrap resamples of patients [1000].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward pass [64].")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that run the network [1].")] = None,
    cpus_per_worker: Annotated[float | None, typer.Option(help="Logical CPUs reserved for a process [1].")] = None,
    gpu: Annotated[bool | None, typer.Option("--gpu", help="Give each process a GPU.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the bootstrap [0].")] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Score a bundle on the untouched test split: AUC a finding and mean, with patient-clustered intervals."""
    flags = {name: value for name, value in locals().items() if name not in ("config", "json")}
    from cxr_ray.evaluation import EvaluateSettings  # noqa: PLC0415
    from cxr_ray.evaluation import evaluate as evaluate_bundle  # noqa: PLC0415
    from cxr_ray.presets import find  # noqa: PLC0415
    from cxr_ray.report import auroc_table  # noqa: PLC0415

    settings = load_settings(EvaluateSettings, config, flags)
    print_settings("evaluate", settings)
    Dataset(settings.data).require_pixels()
    with ray_session():
        evaluation = evaluate_bundle(settings)
    if json:
        print_json(evaluation.to_json())
        return
    without = ", clinical inputs withheld" if settings.withhold == "clinical" else ""
    scores = evaluation.scores
    title = f"{evaluation.bundle.name} on {settings.split}: {scores.images:,} images of {scores.patients:,} patients{without}"
    published = find(evaluation.bundle.preset).published_auc if _is_official_test(settings.split, scores.images) else None
    console.print(auroc_table(title, scores, published))
    if settings.out is not None:
        console.print(f"written: {settings.out}/evaluation.json, {settings.out}/roc.png")


OFFICIAL_TEST_IMAGES = 25_596


def _is_official_test(split: str, images: int) -> bool:
    """Published figures stand beside ours only where both were taken on the whole official test split."""
    return split == "test" and images == OFFICIAL_TEST_IMAGES


train = single_command(_train)
evaluate = single_command(_evaluate)
bundle = command_group("Look at a bundle.")

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
    encoding = {"paper": "image and 17 clinical numbers", "none": "image alone"}[description.encoding]
    for name, value in (
        ("digest", description.digest),
        ("created", f"{description.created:%Y-%m-%d %H:%M} UTC"),
        ("inputs", f"{encoding}, {description.size} x {description.size} pixels"),
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
    console.print(f"{uri}: intact, {description.name} {description.version}, digest {description.digest}")
