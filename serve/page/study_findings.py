"""A study's findings in the order in which people should look at them, and why there are none."""

from collections.abc import Iterable
from dataclasses import dataclass

from serve.store import Finding, InstanceView, Review, StudyView


@dataclass(frozen=True)
class ShownFinding:
    """A finding with its bar, and what a reader said of it; `elsewhere` if only another image of the study is positive."""

    name: str
    probability: float
    threshold: float
    positive: bool
    review: Review | None
    elsewhere: bool = False


def ranked(view: StudyView) -> tuple[ShownFinding, ...]:
    """The findings of a study, positive ones first, then by probability; of each the image that says most."""
    answers = [instance.answer for instance in view.instances if instance.answer]
    most: dict[str, Finding] = {}
    for answer in answers:
        for finding in answer.findings:
            if finding.name not in most or finding.probability > most[finding.name].probability:
                most[finding.name] = finding
    reviews, positive = _reviews(view), _positive(view)
    return _in_order(
        ShownFinding(name, one.probability, one.threshold, name in positive, reviews.get(name)) for name, one in most.items()
    )


def ranked_of_instance(view: StudyView, instance: InstanceView) -> tuple[ShownFinding, ...]:
    """The findings of one image of a study, in the same order."""
    reviews, positive = _reviews(view), _positive(view)
    return _in_order(
        ShownFinding(
            name=one.name,
            probability=one.probability,
            threshold=one.threshold,
            positive=one.positive,
            review=reviews.get(one.name),
            elsewhere=one.name in positive and not one.positive,
        )
        for one in (instance.answer.findings if instance.answer else ())
    )


def reason_in_words(instance: InstanceView) -> str:
    """Why an instance was refused, without its UID, which is at hand here."""
    return (instance.reason or "").removeprefix(f"{instance.sop_instance_uid}: ")


def _reviews(view: StudyView) -> dict[str, Review]:
    return {review.finding: review for review in view.reviews}


def _positive(view: StudyView) -> set[str]:
    return {finding.name for finding in view.findings if finding.positive}


def _in_order(findings: Iterable[ShownFinding]) -> tuple[ShownFinding, ...]:
    return tuple(sorted(findings, key=lambda one: (not one.positive, -one.probability)))
