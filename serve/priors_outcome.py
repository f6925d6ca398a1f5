"""What came of asking an archive for a patient's earlier studies: the node says it with an image, the answer repeats it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Outcome = Literal["off", "none", "found", "timeout", "failed"]
# What tells its sentence among an answer's warnings: the picture of a result always shows that one.
ABOUT_PRIORS = "priors: "


class PriorsOutcome(BaseModel):
    """How the archive was asked for earlier studies, and what came of it.

    `used` counts the studies whose findings the service knew in the end, fetched now or known before. What was used for an
    answer stands in its `clinical.earlier_visits`; a study of unusable images is found and not used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    asked: bool = Field(description="Whether the archive was asked, for this image or another one of the same study.")
    outcome: Outcome = Field(
        description="found: there are earlier studies; none: there is none; timeout: the time was over before all was here; "
        "failed: the archive did not answer as it should; off: it was not asked, see reason."
    )
    studies: int = Field(0, ge=0, le=10_000, description="Earlier chest studies that the archive named and that were wanted.")
    used: int = Field(0, ge=0, le=10_000, description="Of these, the ones whose findings the service knows.")
    seconds: float = Field(0, ge=0, le=3600, description="Seconds that it took.")
    budget_seconds: float = Field(0, ge=0, le=3600, description="Seconds that it was allowed to take.")
    reason: str = Field(
        "", max_length=120, pattern=r"^[ -~]*$", description="Why it was not asked, or what failed; nothing of the patient's."
    )

    def warnings(self) -> list[str]:
        """What an answer says of it: nothing where the archive was asked and all it named is used."""
        lacking = self._lacking()
        return [f"{ABOUT_PRIORS}{lacking}; {self._consequence()}"] if lacking else []

    def _lacking(self) -> str:
        if self.outcome == "off":
            return f"the archive was not asked ({self.reason or 'no reason given'})"
        if self.outcome == "timeout":
            return f"the archive did not answer within {self.budget_seconds:g} s"
        if self.outcome == "failed":
            return f"the archive failed ({self.reason or 'no reason given'})"
        return "not every earlier study could be used" if self.used < self.studies else ""

    def _consequence(self) -> str:
        if not self.used:
            return "predicted without its studies"
        return f"predicted with {self.used} of {self.studies} earlier studies"
