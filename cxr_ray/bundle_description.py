"""What ``bundle.json`` says: everything that is needed to use a model's weights, and where they come from."""

import hashlib
import json
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from cxr_ray.clinical import ClinicalLayout


class BundleDescription(BaseModel):
    """Content of ``bundle.json``.

    `thresholds` are those that answers are judged by, chosen on validation by Youden's index; `other_thresholds` are those of
    other rules (`cxr_ray.operating.choose`).
    `size` is that of the stored squares, `input_size` that of the network's input, which may be smaller. `layout` says which
    clinical numbers the network reads. `training_inputs` are counts of what it was shown in training
    (`cxr_ray.input_profile.InputProfile`), all of them 0 where that is not known.
    `files` maps the weights and the probe to their SHA-256; `digest` is the SHA-256 of this description without `digest`, and
    thereby identifies the whole bundle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[4] = 4
    name: str
    version: str
    created: datetime
    code_version: str
    preset: str
    variant: str
    layout: ClinicalLayout
    size: int | None
    input_size: int | None
    findings: list[str]
    statistics: dict[str, object]
    training_inputs: dict[str, object]
    pixel_recipe: dict[str, object]
    thresholds: dict[str, float]
    other_thresholds: dict[str, dict[str, float]]
    validation: dict[str, object]
    settings: dict[str, object]
    dataset_digest: str
    files: dict[str, str]
    digest: str = ""

    def computed_digest(self) -> str:
        """SHA-256 of the description, its own digest left out."""
        content = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def inputs_in_words(self) -> str:
        """What the network reads."""
        read = []
        if self.input_size is not None:
            read.append(f"image of {self.input_size} x {self.input_size} pixels")
        if self.layout.meta:
            read.append("age, sex, view")
        if self.layout.history:
            read.append("findings of earlier visits")
        width = self.layout.width
        numbers = f" ({width} clinical numbers, {self.layout.encoding} encoding)" if width else ""
        return f"{', '.join(read)}{numbers}"
