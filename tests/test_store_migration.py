"""The schema's history: the migrations make what the models say, and no store that is there loses anything."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from stored_answers import FIRST, RECEIVED, SECOND, answer

from cxr_ray.errors import CxrRayError
from serve.store import Store, StudyFilter
from serve.store.tables import Base

# What the release before the first migration made of its models.
OLD_TABLES = """
CREATE TABLE study (
    id {serial} NOT NULL, study_instance_uid VARCHAR(64) NOT NULL, patient_id TEXT, accession_number TEXT, study_date TEXT,
    received_at {time} NOT NULL, PRIMARY KEY (id), UNIQUE (study_instance_uid)
);
CREATE INDEX ix_study_received_at ON study (received_at);
CREATE TABLE instance (
    id {serial} NOT NULL, sop_instance_uid VARCHAR(64) NOT NULL, study_id INTEGER NOT NULL,
    series_instance_uid VARCHAR(64) NOT NULL, content_digest VARCHAR(64) NOT NULL, status VARCHAR(16) NOT NULL, reason TEXT,
    received_at {time} NOT NULL, answered_at {time} NOT NULL, calling_ae VARCHAR(16), PRIMARY KEY (id),
    UNIQUE (sop_instance_uid), FOREIGN KEY(study_id) REFERENCES study (id)
);
CREATE INDEX ix_instance_study_id ON instance (study_id);
CREATE TABLE result (
    id {serial} NOT NULL, instance_id INTEGER NOT NULL, model_name TEXT NOT NULL, model_version TEXT NOT NULL,
    model_digest VARCHAR(128) NOT NULL, findings JSON NOT NULL, clinical JSON NOT NULL, warnings JSON NOT NULL,
    created_at {time} NOT NULL, PRIMARY KEY (id), UNIQUE (instance_id, model_digest),
    FOREIGN KEY(instance_id) REFERENCES instance (id)
);
"""
TYPES = {
    "sqlite": {"serial": "INTEGER", "time": "DATETIME"},
    "postgresql": {"serial": "SERIAL", "time": "TIMESTAMP WITH TIME ZONE"},
}
OLD_ROWS = """
INSERT INTO study (study_instance_uid, patient_id, accession_number, study_date, received_at)
    VALUES ('1.2', 'P1', 'A1', '20260301', '{received}'), ('1.9', NULL, NULL, NULL, '{received}');
INSERT INTO instance (sop_instance_uid, study_id, series_instance_uid, content_digest, status, received_at, answered_at)
    VALUES ('1.2.3.1', 1, '1.2.3', 'aaaa', 'answered', '{received}', '{received}');
INSERT INTO instance (sop_instance_uid, study_id, series_instance_uid, content_digest, status, received_at, answered_at)
    VALUES ('1.9.1', 2, '1.9', 'bbbb', 'refused', '{received}', '{received}');
INSERT INTO result (instance_id, model_name, model_version, model_digest, findings, clinical, warnings, created_at)
    VALUES (1, 'multi-input', '1.0', 'm1', '[{{"name": "Mass", "probability": 0.7, "threshold": 0.5, "positive": true}}]',
            '{{"view": "PA"}}', '[]', '{received}');
INSERT INTO result (instance_id, model_name, model_version, model_digest, findings, clinical, warnings, created_at)
    VALUES (1, 'multi-input', '1.0', 'm2', '[{{"name": "Mass", "probability": 0.2, "threshold": 0.5, "positive": false}},
             {{"name": "Edema", "probability": 0.9, "threshold": 0.5, "positive": true}}]',
            '{{"view": "PA"}}', '[]', '{received}');
"""


@pytest.fixture
def database(store_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(store_url)
    yield engine
    engine.dispose()


@pytest.fixture
def old_database(database: sa.Engine) -> sa.Engine:
    """A database as the release before the first migration left it."""
    run(database, OLD_TABLES.format(**TYPES[database.dialect.name]))
    zone = "" if database.dialect.name == "sqlite" else "+00"
    run(database, OLD_ROWS.format(received=f"{RECEIVED.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}{zone}"))
    return database


def run(database: sa.Engine, statements: str) -> None:
    with database.begin() as connection:
        for statement in statements.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)


def difference(database: sa.Engine) -> list[object]:
    """What Alembic would still change to have the tables that the models describe."""
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        return compare_metadata(context, Base.metadata)


def test_migrations_make_what_the_models_say(store_url: str, database: sa.Engine) -> None:
    Store(store_url).close()
    assert difference(database) == []
    run(database, "DROP TABLE access")
    assert difference(database) != []


def test_a_store_without_revisions_is_brought_up_to_date_and_keeps_all(store_url: str, old_database: sa.Engine) -> None:
    store = Store(store_url)
    assert difference(old_database) == []
    study, other = store.study("1.2"), store.study("1.9")
    assert (study.patient_id, study.accession_number, study.study_date, study.status) == ("P1", "A1", "20260301", "answered")
    assert study.received_at == RECEIVED
    assert [(finding.name, finding.probability, finding.positive) for finding in study.findings] == [
        ("Mass", 0.2, False),
        ("Edema", 0.9, True),
    ]
    assert store.answer("1.2.3.1", "m1").findings[0].probability == 0.7
    assert (other.status, other.instances[0].status) == ("refused", "refused")
    assert [store.count(StudyFilter(finding=name)) for name in ("Mass", "Edema")] == [0, 1]
    assert [store.count(StudyFilter(status=status)) for status in ("answered", "refused")] == [1, 1]
    # And it goes on from there.
    assert not store.record_result(FIRST, answer(0.9))
    assert store.record_result(SECOND, answer(0.9))
    assert store.record_result(replace(FIRST, sop_instance_uid="1.9.1", study_instance_uid="1.9"), answer(0.8))
    assert [found.study_instance_uid for found in store.studies(filter=StudyFilter(finding="Mass"))] == ["1.9", "1.2"]
    store.close()


def test_a_migration_that_fails_leaves_the_store_as_it_was(store_url: str, old_database: sa.Engine) -> None:
    run(old_database, "CREATE TABLE token (anything TEXT)")
    before = sa.inspect(old_database).get_table_names()
    with pytest.raises(CxrRayError, match=r"token.* already exists"):
        Store(store_url)
    after = sa.inspect(old_database)
    assert after.get_table_names() == before
    assert "status" not in {column["name"] for column in after.get_columns("study")}
    run(old_database, "DROP TABLE token")
    Store(store_url).close()
    assert difference(old_database) == []


def test_a_store_of_a_newer_release_is_refused_in_one_line(store_url: str, database: sa.Engine) -> None:
    Store(store_url).close()
    run(database, "UPDATE alembic_version SET version_num = '9000'")
    with pytest.raises(CxrRayError, match=r"its schema 9000 is newer than this cxr-ray knows \(\d{4}\); install the") as raised:
        Store(store_url)
    assert "\n" not in str(raised.value)
    with database.connect() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all() == ["9000"]


def test_times_of_an_old_store_keep_their_zone(store_url: str, old_database: sa.Engine) -> None:
    store = Store(store_url)
    assert store.count(StudyFilter(finding="Edema", received_from=RECEIVED)) == 1
    assert store.count(StudyFilter(finding="Edema", received_from=datetime(2026, 3, 2, 4, 31, tzinfo=UTC))) == 0
    store.close()
