"""Who gets to know which patient a study is of.

Readers see a pseudonym, and no accession number; who may write results knows the patients, as whoever sends their images does.
Every answer that names a patient asks here.
"""

from serve.http.access import Actor
from serve.http.answers import PatientNames
from serve.http.problems import ApiProblem
from serve.store import Store, StudyFilter, StudyView


def knows_patients(actor: Actor) -> bool:
    """Whether identifiers are shown to this actor."""
    return actor.role != "read"


def patient_names(view: StudyView, actor: Actor, store: Store) -> PatientNames:
    """What a study's patient is called before this actor; asks the store, which is not for an event loop."""
    if knows_patients(actor):
        return PatientNames(view.patient_id, view.accession_number)
    return PatientNames(store.pseudonym(view.patient_id) if view.patient_id else None, None)


def check_filter(wanted: StudyFilter, actor: Actor) -> None:
    """Refuse a search that would tell whose pseudonym is whose.

    Raises
    ------
    ApiProblem
        403.
    """
    if knows_patients(actor):
        return
    for field in ("patient_id", "accession_number"):
        if getattr(wanted, field) is not None:
            raise ApiProblem(
                403, f"{field}: the token's role is read, which sees pseudonyms; searching for it needs role write"
            )
