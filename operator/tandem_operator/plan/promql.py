"""A policy's PromQL, confined to one namespace.

Whoever may write a ScalingPolicy must not read other namespaces' metrics through the operator's
Prometheus. Every selector of a query gets the matcher `namespace="..."`, beside those that it has:
all matchers of a selector have to hold. The query is not parsed, only divided into the words of
PromQL's grammar, which suffices to find every selector; what does not divide is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORDS = re.compile(
    r"""
    (?P<space>\s+)
    | (?P<string>"(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*' | `[^`]*`)
    | (?P<number>0[xX][0-9a-fA-F]+ | (?:\d+(?:ms|[smhdwy]))+ | (?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    | (?P<other>[-+*/%^=!<>~(){}\[\],:@])
    """,
    re.VERBOSE,
)
_LABEL_LISTS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_NEED_LABELS = {"by", "without", "on", "ignoring"}
_KEYWORDS = _LABEL_LISTS | {"and", "or", "unless", "offset", "bool", "inf", "nan"}
_AGGREGATIONS = {
    "sum", "avg", "count", "min", "max", "group", "stddev", "stdvar", "topk", "bottomk",
    "count_values", "quantile", "limitk", "limit_ratio",
}  # fmt: skip
Word = tuple[str, str]


class PromqlRefused(ValueError):
    """The query cannot be confined; the message is a sentence for the user."""


def confined(query: str, namespace: str) -> str:
    """The query with the namespace's matcher in each selector. Raises PromqlRefused."""
    words = _divided(query)
    matcher = f'namespace="{namespace}"'
    out: list[str] = []
    index, selectors = 0, 0
    while index < len(words):
        kind, text = words[index]
        index += 1
        after = _next(words, index)
        if text == "[":
            # A range: durations, and no selectors.
            end = _closing(words, index - 1, "[", "]")
            out += [word for _, word in words[index - 1 : end]]
            index = end
        elif text == "{":
            end = _closing(words, index - 1, "{", "}")
            more = "," if _next(words, index) != "}" else ""
            out += ["{", matcher, more, *(word for _, word in words[index:end])]
            index, selectors = end, selectors + 1
        elif kind == "name" and text.lower() in _LABEL_LISTS and after == "(":
            end = _closing(words, _skip(words, index), "(", ")")
            out += [text, *(word for _, word in words[index:end])]
            index = end
        elif kind == "name" and text.lower() in _NEED_LABELS and after != "{":
            raise PromqlRefused(f"{text} is followed by no label list")
        elif kind == "name" and not _calls(text, after) and after != "{":
            out += [text, "{", matcher, "}"]
            selectors += 1
        else:
            out.append(text)
    if not selectors:
        raise PromqlRefused("it selects no metric")
    return "".join(out)


def _skip(words: Sequence[Word], index: int) -> int:
    """The index of the first word from there on that is no space."""
    while index < len(words) and words[index][0] == "space":
        index += 1
    return index


def _next(words: Sequence[Word], index: int) -> str:
    index = _skip(words, index)
    return words[index][1] if index < len(words) else ""


def _calls(name: str, after: str) -> bool:
    """Whether a name is no metric: a function, an aggregation or a keyword."""
    if name.lower() in _KEYWORDS or after == "(":
        return True
    return name.lower() in _AGGREGATIONS and after.lower() in ("by", "without")


def _divided(query: str) -> Sequence[Word]:
    words: list[Word] = []
    at = 0
    while at < len(query):
        found = _WORDS.match(query, at)
        if found is None:
            raise PromqlRefused(f"{query[at : at + 20]!r} is no PromQL; comments are not taken")
        words.append((str(found.lastgroup), found.group()))
        at = found.end()
    return words


def _closing(words: Sequence[Word], start: int, opening: str, closing: str) -> int:
    """The index behind the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(words)):
        depth += (words[index][1] == opening) - (words[index][1] == closing)
        if depth == 0:
            return index + 1
    raise PromqlRefused(f"a {opening} is not closed")
