"""The results store: what was answered, refused and for which study, what is known of patients, and who may ask.

Any database that SQLAlchemy reaches; SQLite by default, PostgreSQL where more than one machine takes part. `records` is what
goes in and comes out; `tables` how it lies, `migration` how the tables came to be, `database` how they are reached; and a
module a subject has what can be done with it.
"""

from cxr_ray.earlier_visits import EarlierVisit
from serve.store.audit import Audit
from serve.store.histories import Histories
from serve.store.pseudonyms import Pseudonyms
from serve.store.records import (
    ANSWERED,
    REFUSED,
    ROLES,
    Access,
    Answer,
    ArchivedResult,
    ConfirmedVisit,
    Finding,
    HistorySource,
    InstanceView,
    OtherContentError,
    Picture,
    ReceivedInstance,
    Review,
    Role,
    Status,
    StudyFilter,
    StudyFinding,
    StudyView,
    Token,
    Verdict,
)
from serve.store.results import Results
from serve.store.studies import Studies
from serve.store.tokens import Tokens


class Store(Results, Studies, Histories, Pseudonyms, Tokens, Audit):
    """Results by study, histories and pseudonyms by patient, tokens and the audit; safe for threads and processes at once.

    Parameters, errors: see `serve.store.database.Database`.
    """


__all__ = [
    "ANSWERED",
    "REFUSED",
    "ROLES",
    "Access",
    "Answer",
    "ArchivedResult",
    "ConfirmedVisit",
    "EarlierVisit",
    "Finding",
    "HistorySource",
    "InstanceView",
    "OtherContentError",
    "Picture",
    "ReceivedInstance",
    "Review",
    "Role",
    "Status",
    "Store",
    "StudyFilter",
    "StudyFinding",
    "StudyView",
    "Token",
    "Verdict",
]
