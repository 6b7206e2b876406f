"""Tenants' parts of a tier, as flags say them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_operator.api.fleet import TenantPart as DeclaredPart
from tandem_runtime.kv.tiers.tenants import NOBODY, TenantPart, TenantParts

DECLARED = DeclaredPart.model_json_schema()["properties"]["name"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("25..50:search", TenantPart("search", 25, 50)),
        ("25..:search", TenantPart("search", 25)),
        ("..50:search", TenantPart("search", 0, 50)),
        ("..0:batch", TenantPart("batch", 0, 0)),
        ("1..2:a..b:c = d", TenantPart("a..b:c = d", 1, 2)),
    ],
)
def test_a_part(text: str, part: TenantPart) -> None:
    assert TenantPart.parse(text) == part


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["search"], "'search' is no tenant's part of a tier: write FLOOR..QUOTA:NAME"),
        (["..:search"], "is no tenant's part"),
        (["-1..5:search"], "is no tenant's part"),
        (["5:search"], "is no tenant's part"),
        (["5..6:"], "the tenant '' is none: write 1 to 256 printable ASCII characters"),
        (["5..6: a"], "the tenant ' a' is none"),
        (["5..6:a\n"], r"the tenant 'a\\n' is none"),
        (["5..6:é"], "the tenant 'é' is none"),
        (["5..6:" + 257 * "a"], "is none"),
        (["101..:a"], "the floor of tenant a is 101 %: give 0 to 100"),
        (["..101:a"], "the quota of tenant a is 101 %: give 0 to 100"),
        (["6..5:a"], "tenant a has a floor of 6 % and a quota of 5 %: lower the floor, or raise"),
        (["5..6:a", "7..8:a"], "tenant a has two parts of one tier: give one"),
        (["60..:a", "41..:b"], "the tenants' floors are 101 % of the tier: lower them to 100"),
        ([f"..5:{n}" for n in range(65)], "65 tenants have parts of one tier: name at most 64"),
    ],
)
def test_what_is_no_part(texts: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TenantParts.parse(texts, None)


@pytest.mark.parametrize("percent", [-1, 101])
def test_a_default_quota_that_is_none(percent: int) -> None:
    with pytest.raises(ValueError, match=f"the default quota is {percent} %: give 0 to 100"):
        TenantParts.parse([], percent)


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        (TenantParts((TenantPart("a", 1),)), "the floor of tenant a is 1 %"),
        (TenantParts((TenantPart("a", 0, 1),)), "the quota of tenant a is 1 %"),
        (TenantParts((), 1), "the default quota is 1 %"),
    ],
)
def test_less_than_a_page_is_refused(parts: TenantParts, what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} of a tier that holds 50 pages, which is less"):
        parts.policy(50)
    parts.policy(100)


def test_nobody_has_a_part_unless_it_is_given() -> None:
    assert not NOBODY
    assert TenantParts((), 0)
    assert NOBODY.policy(1).named == ()


@given(st.lists(st.integers(1, 100), max_size=64), st.integers(100, 10_000))
def test_floors_of_up_to_the_whole_fit_any_tier(floors: list[int], capacity: int) -> None:
    named = tuple(TenantPart(str(number), floor) for number, floor in enumerate(floors))
    if sum(floors) > 100:
        with pytest.raises(ValueError, match="floors are"):
            TenantParts(named)
    else:
        assert TenantParts(named).policy(capacity).named == tuple(part.name for part in named)


@given(st.text(max_size=4) | st.text(st.characters(min_codepoint=32, max_codepoint=127)))
def test_the_schema_takes_the_same_names(name: str) -> None:
    # `\Z`: in Python, unlike in the API server, `$` matches before a line feed at the end, too.
    pattern = DECLARED["pattern"].replace("$", r"\Z")
    declared = re.search(pattern, name) is not None and len(name) <= DECLARED["maxLength"]
    try:
        TenantPart(name)
    except ValueError:
        assert not declared
    else:
        assert declared
