"""pydantic's JSON schema -> the structural schema that a CRD may carry.

Kubernetes wants no `$ref`, no `title`, no `anyOf` with null, and `additionalProperties` only for
maps. What pydantic cannot say (list types, CEL) comes in through `json_schema_extra` and `cel`.
"""

from __future__ import annotations

from typing import Any

from tandem_operator.api.meta import ApiModel

Schema = dict[str, Any]

_KEPT = (
    "description",
    "type",
    "format",
    "default",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
)
_EXTENSION = "x-kubernetes-"


def structural(model: type[ApiModel]) -> Schema:
    """The structural schema of a model, with its CEL rules.

    Raises ValueError for what a structural schema cannot express (unions, recursion).
    """
    return _Inliner(_collect(model)).model(model)


def _collect(model: type[ApiModel]) -> dict[str, type[ApiModel]]:
    """Every ApiModel under `model`, by class name (pydantic's `$defs` keys)."""
    found: dict[str, type[ApiModel]] = {}
    queue: list[Any] = [model]
    while queue:
        entry = queue.pop()
        if isinstance(entry, type) and issubclass(entry, ApiModel):
            if entry.__name__ not in found:
                found[entry.__name__] = entry
                queue += [field.annotation for field in entry.model_fields.values()]
        else:
            queue += getattr(entry, "__args__", ())
    return found


def _given(default: Schema) -> Schema:
    """A default without what is left out in it: the API server takes no null for that."""
    return {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in default.items()
        if value is not None
    }


class _Inliner:
    """Resolves the references of one schema document."""

    def __init__(self, models: dict[str, type[ApiModel]]) -> None:
        self._models = models
        self._open: list[str] = []

    def model(self, model: type[ApiModel]) -> Schema:
        name = model.__name__
        if name in self._open:
            raise ValueError(f"{name} contains itself: a CRD schema cannot be recursive")
        self._open.append(name)
        try:
            document = model.model_json_schema(by_alias=True)
            schema = self.node(document)
        finally:
            self._open.pop()
        if model.cel:
            schema["x-kubernetes-validations"] = [rule.schema() for rule in model.cel]
        return schema

    def node(self, node: Schema) -> Schema:
        """One node of pydantic's schema, made structural."""
        if "$ref" in node:
            own = {key: value for key, value in node.items() if key != "$ref"}
            return self.model(self._models[node["$ref"].rsplit("/", 1)[1]]) | self.node(own)
        if "anyOf" in node:
            return self._optional(node)
        schema = {key: node[key] for key in _KEPT if key in node}
        schema |= {key: value for key, value in node.items() if key.startswith(_EXTENSION)}
        if isinstance(schema.get("default"), dict):
            schema["default"] = _given(schema["default"])
        if "const" in node:
            schema["enum"] = [node["const"]]
        if "description" in schema:
            schema["description"] = " ".join(schema["description"].split())
        if "properties" in node:
            schema["properties"] = {k: self.node(v) for k, v in node["properties"].items()}
            if node.get("required"):
                schema["required"] = sorted(node["required"])
        if "items" in node:
            schema["items"] = self.node(node["items"])
        return schema

    def _optional(self, node: Schema) -> Schema:
        """`X | None` is X that may be left out; any other union is an error."""
        options = [option for option in node["anyOf"] if option.get("type") != "null"]
        if len(options) != 1:
            raise ValueError(f"a CRD schema has no unions: {options}")
        own = {k: v for k, v in node.items() if k not in ("anyOf", "default")}
        return self.node(options[0]) | self.node(own)
