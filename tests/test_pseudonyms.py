"""Pseudonyms: one a patient and store, the same for all who open it, and nothing to be read from them."""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from serve.store import Store


def pseudonym(url: str, patient_id: str) -> str:
    with closing(Store(url)) as store:
        return store.pseudonym(patient_id)


def test_who_opens_a_new_store_at_once_agrees_with_who_opens_it_later(store_url: str) -> None:
    Store(store_url).close()
    with ThreadPoolExecutor(8) as pool:
        said = set(pool.map(lambda _: pseudonym(store_url, "MRN-1"), range(8)))
    assert len(said) == 1
    assert pseudonym(store_url, "MRN-1") in said


def test_patients_and_stores_are_told_apart(tmp_path: Path) -> None:
    one, other = (f"sqlite:///{tmp_path / name}" for name in ("one.sqlite", "other.sqlite"))
    with closing(Store(one)) as store:
        said = [store.pseudonym(f"MRN-{number}") for number in range(200)]
        assert len(set(said)) == 200
        assert all(re.fullmatch(r"P-[A-Z2-7]{10}", each) for each in said)
        assert store.pseudonym(" MRN-7 ") == said[7]
    assert pseudonym(other, "MRN-7") != said[7]
