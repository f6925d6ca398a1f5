"""Findings: the order, the spellings and the codes that everything else aligns by."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_ray.errors import CxrRayError
from cxr_ray.findings import CODES, FINDINGS, NO_FINDING, canonical, encode, names, parse, positions

# Wang et al. 2017 has the first eight, the release added six.
NIH_ORDER = [
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
]

SUBSETS = st.lists(st.sampled_from(FINDINGS), unique=True)


def verhoeff_holds(number: str) -> bool:
    """Verhoeff's check over the dihedral group D5, as SNOMED CT identifiers carry it."""

    def times(a: int, b: int) -> int:
        turn = (a % 5 + (b if a < 5 else -b)) % 5
        return turn if (a < 5) == (b < 5) else turn + 5

    permutation = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)
    check = 0
    for place, character in enumerate(reversed(number)):
        digit = int(character)
        for _ in range(place % 8):
            digit = permutation[digit]
        check = times(check, digit)
    return check == 0


def test_the_order_is_nihs_and_not_sorted():
    assert list(FINDINGS) == NIH_ORDER
    assert list(FINDINGS) != sorted(FINDINGS)


@pytest.mark.parametrize(
    ("spelling", "finding"),
    [
        ("Infiltrate", "Infiltration"),
        ("Pleural Thickening", "Pleural_Thickening"),
        ("pleural-thickening", "Pleural_Thickening"),
        ("PNEUMOTHORAX", "Pneumothorax"),
        (" Mass ", "Mass"),
        *((name, name) for name in NIH_ORDER),
    ],
)
def test_spellings_met_in_copies_of_the_release(spelling, finding):
    assert canonical(spelling) == finding


@pytest.mark.parametrize("spelling", ["Fracture", "Mas", "", "Mass|Nodule", NO_FINDING])
def test_another_spelling_is_refused_with_the_known_ones(spelling):
    with pytest.raises(CxrRayError, match="Atelectasis, Cardiomegaly") as refused:
        canonical(spelling)
    assert repr(spelling) in str(refused.value)


@given(SUBSETS)
@settings(deadline=None)
def test_parse_and_names_are_inverse(present):
    in_order = [name for name in FINDINGS if name in present]
    labels = parse("|".join(present) or NO_FINDING)
    assert labels.dtype == np.uint8
    assert labels.shape == (14,)
    assert labels.sum() == len(present)
    assert names(labels) == in_order


def test_parse_of_a_text_of_the_release():
    assert np.flatnonzero(parse("Hernia|Infiltration")).tolist() == [3, 13]
    assert parse("No Finding").sum() == parse("no_finding").sum() == 0
    np.testing.assert_array_equal(parse("Mass|Mass"), parse("Mass"))


@pytest.mark.parametrize("text", ["", "  ", "Mass|No Finding", "Mass|Moss", "Mass,Nodule"])
def test_parse_refuses(text):
    with pytest.raises(CxrRayError) as refused:
        parse(text)
    assert "\n" not in str(refused.value)


def test_encode_of_no_names_is_no_finding():
    np.testing.assert_array_equal(encode([]), np.zeros(14, dtype=np.uint8))
    with pytest.raises(CxrRayError, match="No Finding"):
        encode([NO_FINDING, "Mass"])


@given(st.permutations(FINDINGS))
@settings(deadline=None)
def test_positions_align_by_name(available):
    values = np.arange(14)
    shuffled = np.array([values[FINDINGS.index(name)] for name in available])
    np.testing.assert_array_equal(shuffled[positions(FINDINGS, available)], values)


def test_positions_name_what_is_absent():
    with pytest.raises(CxrRayError, match=r"findings Mass, Hernia are not among Edema"):
        positions(["Mass", "Edema", "Hernia"], ["Edema"])


def snomed_codes() -> Sequence[str]:
    return [code.value for code in CODES.values() if code.scheme == "SCT"]


def test_every_finding_has_a_code_of_its_own():
    assert tuple(CODES) == FINDINGS
    assert len({(code.scheme, code.value) for code in CODES.values()}) == 14


def test_snomed_codes_carry_verhoeffs_check_digit():
    # 2363 is Verhoeff's usual example; the others differ from valid codes by a digit or by two that swapped places.
    assert verhoeff_holds("2363")
    for wrong in ("2364", "3263", "95436003", "46621070"):
        assert not verhoeff_holds(wrong)
    assert len(snomed_codes()) == 13
    assert [code for code in snomed_codes() if not verhoeff_holds(code)] == []


def test_only_pleural_thickening_needs_a_private_scheme():
    assert {name for name, code in CODES.items() if code.scheme != "SCT"} == {"Pleural_Thickening"}
    # PS3.16 section 8.2: private designators begin with 99.
    assert CODES["Pleural_Thickening"].scheme.startswith("99")


@pytest.mark.parametrize("finding", FINDINGS)
def test_codes_keep_the_limits_of_their_value_representations(finding):
    code = CODES[finding]
    for text, limit in ((code.value, 16), (code.scheme, 16), (code.meaning, 64)):
        assert 0 < len(text) <= limit
        assert text == text.strip()
        assert "\\" not in text
        assert text.isascii()
