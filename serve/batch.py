"""Many images at once: a folder of files into one Parquet file, on Ray Data.

What can be wrong before the first image is found out first: `make_plan` reads the bundle's description, lists the files, reads
the clinical table and looks whether the result may be written. Then `predict` lets paths stream through tasks that decode and
actors that run the network, and writes the rows as they come; Ray holds decoders back where the network is slower, so that
memory does not grow with the number of images.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
from pyarrow import fs

from cxr_ray import __version__, storage
from cxr_ray.bundle import read_description, required_size
from cxr_ray.bundle_description import BundleDescription
from cxr_ray.cluster_growth import await_cpu, cpus_at_most, nodes_at_most
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.placement import check_task, reserved
from cxr_ray.progress import ProgressReport
from ingest.files import SourceFile, list_files
from serve.answers_file import ANSWERED, answers_file, claim
from serve.batch_settings import PredictSettings
from serve.clinical_table import read_clinical_table
from serve.uploads import NOTHING_STATED, Stated

# A task of so many files lasts about a second, and hands on a few megabytes.
_FILES_A_TASK = 64
_TASK_BYTES = 32 * 1024**2
_COMMONEST = 5
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Plan:
    """What is to be answered, by which bundle.

    Attributes
    ----------
    stated
        File to what the clinical table states of its patient, for the files that it names.
    """

    settings: PredictSettings
    bundle: BundleDescription
    filesystem: fs.FileSystem
    files: list[SourceFile]
    stated: Mapping[str, Stated]


@dataclass
class Summary:
    """How a run ended.

    Attributes
    ----------
    reasons
        Why files were refused, and how many for each reason; numbers in it read "N".
    seconds
        From the first path handed out to the last row written, the start of Ray's processes included.
    """

    answered: int = 0
    refused: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def files(self) -> int:
        """Files in all."""
        return self.answered + self.refused

    @property
    def rate(self) -> float:
        """Files a second."""
        return self.files / self.seconds if self.seconds else 0.0

    def commonest(self) -> list[tuple[str, int]]:
        """The commonest reasons, with the number of files for each."""
        return self.reasons.most_common(_COMMONEST)

    def count(self, rows: pa.Table) -> None:
        """Add rows of the result."""
        statuses = rows["status"].to_pylist()
        answered = statuses.count(ANSWERED)
        self.answered += answered
        self.refused += len(statuses) - answered
        self.reasons.update(_NUMBER.sub("N", why) for why in rows["reason"].to_pylist() if why is not None)


def make_plan(settings: PredictSettings) -> Plan:
    """Find out what is to be done, and whatever stands against it.

    Raises
    ------
    CxrRayError
        If the bundle is unusable or reads no images, the input is not there or empty, the clinical table has a wrong value, or
        the result is there already or cannot be written.
    """
    settings = settings.model_copy(update={name: storage.absolute(getattr(settings, name)) for name in ("bundle", "input")})
    bundle = read_description(settings.bundle)
    required_size(bundle)
    filesystem, root, files = list_files(settings.input, "--input")
    if not files:
        raise CxrRayError(f"--input {storage.shown(settings.input)}: holds no files; give a folder of PNG, JPEG or DICOM files")
    _check_apart(settings, filesystem, root, single=files[0].location == storage.resolve(settings.input)[1].rstrip("/"))
    stated: Mapping[str, Stated] = {}
    if settings.clinical is not None:
        stated = read_clinical_table(settings.clinical, {file.name for file in files})
    claim(settings.out, overwrite=settings.overwrite)
    return Plan(settings, bundle, filesystem, files, stated)


def _check_apart(settings: PredictSettings, filesystem: fs.FileSystem, root: str, *, single: bool) -> None:
    """A result among the images would be taken for one of them the next time."""
    target, path = storage.resolve(settings.out)
    if not single and target.equals(filesystem) and path.startswith(f"{root}/"):
        raise UsageError(f"--out {storage.shown(settings.out)}: lies below --input; write it to another folder")


def predict(plan: Plan) -> Summary:
    """Answer every file and write the result; Ray has to be initialised.

    Raises
    ------
    UsageError
        If the cluster has no CPU left to decode with.
    CxrRayError
        If no node of the cluster can ever run the network.
    """
    settings, described = plan.settings, plan.bundle
    check_task(reserved(1, gpu=settings.gpu), "--gpu" if settings.gpu else "the network")
    if cpus_at_most() <= settings.workers:
        raise UsageError(
            f"--workers {settings.workers}: leaves none of the cluster's {cpus_at_most()} CPUs for decoding; give fewer"
        )
    await_cpu()
    identity = (described.name, described.version, described.digest)
    summary, started = Summary(), time.monotonic()
    with (
        answers_file(settings.out, identity, _metadata(plan)) as answers,
        ProgressReport("predict", len(plan.files), "images") as progress,
    ):
        for rows in _answers(plan):
            answers.write(rows)
            summary.count(rows)
            progress.advance(rows.num_rows, f"{summary.refused} refused")
        if summary.files != len(plan.files):
            raise CxrRayError(f"{summary.files} of {len(plan.files)} files were answered or refused; run the command again")
    summary.seconds = time.monotonic() - started
    return summary


def _metadata(plan: Plan) -> dict[str, object]:
    described, settings = plan.bundle, plan.settings
    return {
        "model": {"name": described.name, "version": described.version, "digest": described.digest},
        "thresholds": dict(described.thresholds),
        "input": storage.shown(settings.input),
        "clinical": None if settings.clinical is None else storage.shown(settings.clinical),
        "engine": settings.engine,
        "files": len(plan.files),
        "code_version": __version__,
    }


def _answers(plan: Plan) -> Iterator[pa.Table]:
    import ray.data  # noqa: PLC0415 - takes a second that other commands need not pay

    from serve.batch_tasks import Network, decode_files  # noqa: PLC0415 - torch, which the plan needs not

    settings, size = plan.settings, required_size(plan.bundle)
    files = ray.data.from_arrow(list(_tasks(plan, max(1, min(_FILES_A_TASK, _TASK_BYTES // size**2)))))
    # The result has the files in their order, and the same files make the same batches whenever they are read.
    files.context.execution_options.preserve_order = True
    decoded = files.map_batches(
        decode_files,
        fn_kwargs={"filesystem": plan.filesystem, "size": size},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
    )
    nodes = sum(node.get("CPU", 0.0) >= 1 for node in nodes_at_most())
    answered = decoded.map_batches(
        Network,
        fn_constructor_kwargs={"settings": settings, "share": 1 / -(-settings.workers // nodes)},
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=settings.workers),
        num_cpus=1,
        num_gpus=1 if settings.gpu else 0,
        # Where a core is shared with decoders, threads that wait for each other spinning take ten times as long.
        runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
    )
    yield from answered.iter_batches(batch_size=None, batch_format="pyarrow")


def _tasks(plan: Plan, files_a_task: int) -> Iterator[pa.Table]:
    """The files with what is stated of their patients, a table a task."""
    from serve.batch_tasks import FILES_SCHEMA  # noqa: PLC0415 - as above

    for start in range(0, len(plan.files), files_a_task):
        rows = [
            {"location": file.location, "file": file.name, **plan.stated.get(file.name, NOTHING_STATED)._asdict()}
            for file in plan.files[start : start + files_a_task]
        ]
        yield pa.Table.from_pylist(rows, schema=FILES_SCHEMA)
