"""pydantic's schema made structural."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field
from tandem_operator.api.meta import ApiModel, Rule
from tandem_operator.api.schema import structural


class Leaf(ApiModel):
    """A leaf."""

    cel: ClassVar[tuple[Rule, ...]] = (Rule("self.fooBar > 0", "be positive"),)
    foo_bar: int
    """Words
    on two lines."""


class Tree(ApiModel):
    """A tree."""

    leaf: Leaf
    maybe: Leaf | None = None
    """An optional leaf."""
    leaves: Annotated[tuple[Leaf, ...], Field(max_length=3)] = ()
    kind: Literal["only"] = "only"


class Two(ApiModel):
    """A union."""

    either: int | str


class Loop(ApiModel):
    """Recursive."""

    next: Loop | None = None


LEAF = {
    "type": "object",
    "description": "A leaf.",
    "properties": {"fooBar": {"type": "integer", "description": "Words on two lines."}},
    "required": ["fooBar"],
    "x-kubernetes-validations": [{"rule": "self.fooBar > 0", "message": "be positive"}],
}


def test_references_are_inlined_and_null_is_absence() -> None:
    assert structural(Tree) == {
        "type": "object",
        "description": "A tree.",
        "required": ["leaf"],
        "properties": {
            "leaf": LEAF,
            "maybe": LEAF | {"description": "An optional leaf."},
            "leaves": {"type": "array", "items": LEAF, "maxItems": 3, "default": []},
            "kind": {"type": "string", "enum": ["only"], "default": "only"},
        },
    }


def test_a_union_is_refused() -> None:
    with pytest.raises(ValueError, match="no unions"):
        structural(Two)


def test_recursion_is_refused() -> None:
    with pytest.raises(ValueError, match="Loop contains itself"):
        structural(Loop)
