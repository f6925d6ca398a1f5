"""`cxr-ray ingest`: sources of radiographs into datasets."""

from pathlib import Path
from typing import Annotated

import typer

from cxr_ray.dataset import Manifest
from cxr_ray.ray_session import ray_session
from cxr_ray.settings import load_settings
from cxr_ray.shared_paths import check_shared
from cxr_ray.terminal import command_group, console, print_json, print_settings

app = command_group("Turn a release, DICOM files or phantoms into a dataset.")

Config = Annotated[Path | None, typer.Option(help="YAML file with settings; flags override it.")]
Out = Annotated[str | None, typer.Option(help="Folder or URI of the dataset.")]
Size = Annotated[int | None, typer.Option(help="Edge of the stored square, in pixels [256].")]
MaxQuarantined = Annotated[
    float | None, typer.Option(help="Share of unreadable images that stops the run; 1 never stops it [0.01].")
]
Overwrite = Annotated[bool | None, typer.Option("--overwrite", help="Replace the dataset that OUT holds.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random [0].")]
Json = Annotated[bool, typer.Option("--json", help="Print the manifest's summary as JSON.")]


@app.command()
def nih(
    release: Annotated[
        str | None, typer.Option(help="Folder or URI of the NIH release, its images in folders or as downloaded.")
    ] = None,
    out: Out = None,
    size: Size = None,
    metadata_only: Annotated[
        bool | None, typer.Option("--metadata-only", help="Write every row of the table, without pixels.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="official (the release's lists), random (by patient) or lists (those given) [official].")
    ] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="Share of train_val, or of all with --split random, for validation [0.1].")
    ] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="With --split random: share of the images for the test [0.2].")
    ] = None,
    train_list: Annotated[str | None, typer.Option(help="With --split lists: file or URI, an image's name a line.")] = None,
    val_list: Annotated[str | None, typer.Option(help="The same for validation.")] = None,
    test_list: Annotated[str | None, typer.Option(help="The same for the test.")] = None,
    seed: Seed = None,
    max_quarantined: MaxQuarantined = None,
    overwrite: Overwrite = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Ingest the NIH ChestX-ray14 release, or the part of it that is there."""
    flags = dict(
        release=release,
        out=out,
        size=size,
        metadata_only=metadata_only,
        split=split,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        train_list=train_list,
        val_list=val_list,
        test_list=test_list,
        seed=seed,
        max_quarantined=max_quarantined,
        overwrite=overwrite,
    )
    from ingest.nih import NihSettings, ingest_nih  # noqa: PLC0415 - each source brings its own libraries

    settings = load_settings(NihSettings, config, flags)
    print_settings("ingest nih", settings)
    with ray_session():
        lists = {"train_list": settings.train_list, "val_list": settings.val_list, "test_list": settings.test_list}
        check_shared({"release": settings.release, **lists}, {"out": settings.out})
        _print_manifest(settings.out, ingest_nih(settings), as_json=json)


@app.command()
def dicom(
    source: Annotated[
        str | None, typer.Option(help="DICOM files: a folder or URI with all folders and zips in it; a zip; a DICOMDIR.")
    ] = None,
    out: Out = None,
    size: Size = None,
    labels: Annotated[
        str | None, typer.Option(help="CSV with a UID or accession number, and the labels, a row; without it, no labels.")
    ] = None,
    patient_key_file: Annotated[
        Path | None, typer.Option(help="File with the secret that identifiers are hashed with, 16 bytes or more.")
    ] = None,
    val_fraction: Annotated[float | None, typer.Option(help="Share of the patients for validation [0.1].")] = None,
    test_fraction: Annotated[float | None, typer.Option(help="Share of the patients for the test [0.2].")] = None,
    max_quarantined: MaxQuarantined = None,
    overwrite: Overwrite = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Ingest frontal chest radiographs from DICOM files."""
    flags = dict(
        source=source,
        out=out,
        size=size,
        labels=labels,
        patient_key_file=patient_key_file,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        max_quarantined=max_quarantined,
        overwrite=overwrite,
    )
    from ingest.dicom import DicomSettings, ingest_dicom  # noqa: PLC0415

    settings = load_settings(DicomSettings, config, flags)
    print_settings("ingest dicom", settings)
    with ray_session():
        key = settings.patient_key_file
        read = {"source": settings.source, "labels": settings.labels, "patient_key_file": None if key is None else str(key)}
        check_shared(read, {"out": settings.out})
        _print_manifest(settings.out, ingest_dicom(settings), as_json=json)


@app.command()
def phantom(
    out: Out = None,
    patients: Annotated[int | None, typer.Option(help="Patients, each with one to several visits.")] = None,
    size: Size = None,
    seed: Seed = None,
    config: Config = None,
) -> None:
    """Make a release of synthetic radiographs: PNG and CSV laid out as NIH's, and the same images as DICOM."""
    from ingest.phantom_release import PhantomSettings, make_release  # noqa: PLC0415

    flags = dict(out=out, patients=patients, size=size, seed=seed)
    settings = load_settings(PhantomSettings, config, flags)
    print_settings("ingest phantom", settings)
    with ray_session():
        check_shared({}, {"out": settings.out})
        images = make_release(settings)
    console.print(f"{settings.patients} patients, {images} images in {settings.out}")
    console.print(f"next: cxr-ray ingest nih --release {settings.out} --out DATASET --size 64")


def _print_manifest(out: str, manifest: Manifest, *, as_json: bool) -> None:
    if as_json:
        print_json(manifest.model_dump(mode="json", exclude={"splits": {"__all__": {"shards"}}}))
        return
    from ingest.summary import print_summary  # noqa: PLC0415 - pyarrow and pandas come with it

    print_summary(out, manifest)
