"""What all our kinds share: the model base class, CEL rules, conditions, owner references.

Specs are read with unknown fields ignored, so that a newer CRD does not crash an older operator;
the API server is what refuses unknown fields to users.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """One CEL validation of a schema node.

    `message` is what the user reads; with `message_expression` (CEL, a string) it is only the
    fallback that the API server uses when the expression fails.
    """

    rule: str
    message: str
    message_expression: str | None = None
    field_path: str | None = None

    def schema(self) -> dict[str, str]:
        """The entry of `x-kubernetes-validations`."""
        entry = {"rule": self.rule, "message": self.message}
        if self.message_expression:
            entry["messageExpression"] = self.message_expression
        if self.field_path:
            entry["fieldPath"] = self.field_path
        return entry


def rules(*entries: Rule) -> dict[str, Any]:
    """`json_schema_extra` that attaches CEL rules to a single field."""
    return {"x-kubernetes-validations": [entry.schema() for entry in entries]}


class ApiModel(BaseModel):
    """Base of everything inside a custom resource: camelCase outside, snake_case inside."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    cel: ClassVar[tuple[Rule, ...]] = ()
    """Rules of this node; `self` is the object."""


Name = Annotated[str, Field(min_length=1, max_length=253)]
Quantity = Annotated[str, Field(min_length=1, max_length=32)]
"""A Kubernetes quantity such as 64Gi; checked by CEL, never parsed by us."""

PartialTemplate = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}),
]
"""A partial PodTemplateSpec; the API server checks the Pod that comes out (TemplateValid)."""


class NameRef(ApiModel):
    """A reference to an object of the same namespace."""

    name: Name


class Condition(ApiModel):
    """A kstatus condition; `type` is unique in its list."""

    type: Annotated[str, Field(max_length=316)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(max_length=1024)]
    message: Annotated[str, Field(max_length=32768)]
    observed_generation: int
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]


Conditions = Annotated[
    tuple[Condition, ...],
    Field(
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
        }
    ),
]


@dataclass(frozen=True)
class Judgement:
    """A condition as the plan decides it, before it is known since when it holds."""

    type: str
    status: bool | None
    """None: Unknown."""
    reason: str
    message: str


_STATUS: dict[bool | None, Literal["True", "False", "Unknown"]] = {
    True: "True",
    False: "False",
    None: "Unknown",
}


def set_conditions(
    previous: Sequence[Condition], now: Iterable[Judgement], generation: int, now_text: str
) -> tuple[Condition, ...]:
    """The condition list of a status: sorted by type, transition times kept where status did.

    A condition that is not in `now` is dropped.
    """
    since = {(c.type, c.status): c.last_transition_time for c in previous}
    conditions = []
    for judgement in sorted(now, key=lambda j: j.type):
        status = _STATUS[judgement.status]
        conditions.append(
            Condition(
                type=judgement.type,
                status=status,
                reason=judgement.reason,
                message=judgement.message,
                observed_generation=generation,
                last_transition_time=since.get((judgement.type, status), now_text),
            )
        )
    return tuple(conditions)


def find_condition(conditions: Sequence[Condition], type_: str) -> Condition | None:
    """The condition of that type, if the object has it."""
    return next((c for c in conditions if c.type == type_), None)
