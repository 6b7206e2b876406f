"""Whether a configuration has to be applied: an idle operator writes nothing.

A live object is as configured when every field of the configuration is in it (the API server adds
defaults beside them) and it carries the hash of this very configuration (a field that is no longer
configured changes the hash, and server-side apply then removes it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem_operator.names import ANNOTATION_APPLIED, Reason
from tandem_operator.plan.actions import Apply, Manifest
from tandem_operator.plan.merge import merge
from tandem_operator.plan.revision import digest


def apply_if_needed(manifest: Manifest, live: Mapping[str, Any] | None) -> tuple[Apply, ...]:
    """The Apply of a configuration, or nothing where `live` is as configured."""
    annotation = {ANNOTATION_APPLIED: digest(manifest)}
    configured = merge(manifest, {"metadata": {"annotations": annotation}})
    if live is not None and covers(configured, live):
        return ()
    return (Apply(configured, Reason.CONFIGURED),)


def covers(wanted: Any, live: Any) -> bool:
    """Whether `live` has everything of `wanted`; it may have more fields, not more list items.

    Owner references alone may have further items: each fleet adds its own to shared objects.
    """
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and all(
            (_has_owners if key == "ownerReferences" else covers)(value, live.get(key))
            for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(live, list)
            and len(wanted) == len(live)
            and all(covers(w, x) for w, x in zip(wanted, live, strict=True))
        )
    return bool(wanted == live)


def _has_owners(wanted: list[Any], live: Any) -> bool:
    return all(any(covers(w, x) for x in live or ()) for w in wanted)
