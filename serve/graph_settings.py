"""What the Serve graph is made of, as flags, YAML and Serve's own configuration state it."""

from pydantic import Field, field_validator

from cxr_ray.engines import EngineName
from cxr_ray.errors import CxrRayError
from cxr_ray.settings import Settings
from serve.logs import LogLevel
from serve.store import HistorySource
from serve.thresholds import checked_thresholds

DEFAULT_MODEL = "default"


class GraphSettings(Settings):
    """What the Serve graph is made of."""

    bundle: str = Field(description="Folder or URI of the bundle that answers.")
    also: dict[str, str] = Field(
        default_factory=dict, description="Further bundles by the name that a request asks for with model=NAME."
    )
    shadow: str | None = Field(None, description="Bundle that is asked about every stored instance, and never shown.")
    thresholds: dict[str, float] = Field(
        default_factory=dict, description="Thresholds by finding in place of those of the bundle that answers."
    )
    store: str = Field("sqlite:///cxr-ray-results.sqlite", description="SQLAlchemy URL of the results store.")
    history_source: HistorySource = Field(
        "confirmed",
        description="Whose earlier findings count where a request states none: confirmed ones, the service's own answers "
        "(predicted), both, or none.",
    )
    engine: EngineName = Field("auto", description="What computes: torch, openvino, or auto for the faster that agrees.")
    threads: int | None = Field(None, ge=1, description="CPU threads of a network replica; default: the CPUs, shared by them.")
    fronts: int = Field(1, ge=1, description="Replicas that take requests and decode images.")
    max_fronts: int | None = Field(None, ge=1, description="Replicas of them at most, added under load; default: fronts.")
    decoders: int = Field(2, ge=1, description="Processes that decode images, of each replica that takes requests.")
    replicas: int = Field(1, ge=1, description="Processes that run the network.")
    max_replicas: int | None = Field(None, ge=1, description="Of them at most, added under load; default: replicas.")
    batch_size: int = Field(16, ge=1, le=256, description="Images a forward pass at most.")
    batch_wait: float = Field(0.0, ge=0, le=1, description="Seconds to wait for a batch to fill; 0 takes what is there.")
    max_queued: int = Field(64, ge=1, description="Requests that may be under way; beyond, the answer is 503.")
    max_wait_seconds: float = Field(
        2, gt=0, description="Seconds that a request may have to wait at the pace of those before it; beyond, 503."
    )
    max_images: int = Field(32, ge=1, le=256, description="Images a request.")
    max_upload_mb: int = Field(128, ge=1, description="Largest request, in MB.")
    max_memory_mb: int = Field(2048, ge=1, description="Uploads under way in one replica, in MB; beyond, the answer is 503.")
    upload_seconds: float = Field(60, gt=0, description="Seconds that an upload may take to arrive.")
    answer_seconds: float = Field(60, gt=0, description="Seconds that an image may take to be answered.")
    gpu: bool = Field(default=False, description="Give each network a GPU.")
    drift_window: int = Field(
        500, ge=2, le=100_000, description="Last images of a network whose inputs are compared with its training split's."
    )
    stow_spool: str | None = Field(
        None,
        description="Spool of a DICOM node on this machine, through which STOW-RS goes, so that results are delivered; "
        "default: with_node's own, else none: STOW-RS is answered at once.",
    )
    stow_min_free_mb: int = Field(2147, ge=0, description="MB of free disk below which nothing goes into that spool; 0 is off.")
    log_folder: str | None = Field(
        None, description="Folder, on each machine, of the replicas' log files; default: logs/serve of Ray's session."
    )
    log_level: LogLevel = Field("info", description="Least that is logged: debug, info or warning.")

    @field_validator("also")
    @classmethod
    def _named(cls, also: dict[str, str]) -> dict[str, str]:
        for name in also:
            if name == DEFAULT_MODEL or not name.replace("-", "").replace("_", "").isalnum() or len(name) > 32:
                raise ValueError(
                    f"{name!r} is no name for a further model; use letters, digits, - and _, not {DEFAULT_MODEL!r}"
                )
        return also

    @field_validator("thresholds")
    @classmethod
    def _known(cls, thresholds: dict[str, float]) -> dict[str, float]:
        try:
            return checked_thresholds(thresholds)
        except CxrRayError as error:
            raise ValueError(str(error)) from None
