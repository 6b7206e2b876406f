"""Where a model's files are: from a source URI to a path on this machine. No torch.

- `package://NAME/path`: inside an installed Python package or distribution, found without
  importing it;
- `file:///path`: in the container's own file system;
- `pvc://CLAIM/path`: on a PersistentVolumeClaim, which the operator mounts at `PVC_DIR/CLAIM`;
- `hf://ORG/NAME`, `s3://BUCKET/path`, `https://HOST/path`: fetched into the folder that
  `ENV_MODEL_CACHE` names, once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.hub import fetch_from_hub
from tandem_runtime.checkpoint.objects import fetch_objects
from tandem_runtime.contract import ENV_MODEL_CACHE, PVC_DIR

SUPPORTED = (
    "package://NAME/path, file:///path, pvc://CLAIM/path, hf://ORG/NAME, s3://BUCKET/path and "
    "https://HOST/path"
)
DEFAULT_CACHE = Path("~/.cache/tandem/models")


def resolve_source(uri: str, *, headers_only: bool = False) -> Path:
    """The file or folder that a source URI names; it exists.

    Args:
        uri: one of `SUPPORTED`.
        headers_only: of large weights that have to be fetched, fetch the headers (headers.py).

    Raises:
        ModelError: `UnsupportedSource` for another scheme or a malformed URI, `WeightsMissing`
            where there is nothing, `SourceUnauthorized` and `SourceUnreachable` where the model
            cannot be fetched.
    """
    parts = urlsplit(uri)
    path = unquote(parts.path)
    match parts.scheme:
        case "package":
            located = _within(_package_root(parts.netloc, uri), path, uri)
        case "pvc":
            if not parts.netloc:
                raise ModelError("UnsupportedSource", f"{uri} names no claim: pvc://CLAIM/path")
            located = _within(Path(PVC_DIR) / parts.netloc, path, uri)
        case "file":
            if parts.netloc not in ("", "localhost") or not path.startswith("/"):
                raise ModelError(
                    "UnsupportedSource",
                    f"{uri} is no local file: write file:///path, three slashes",
                )
            located = Path(path)
        case "hf":
            return fetch_from_hub(uri, _cache(), headers_only=headers_only)
        case "s3" | "https" | "http":
            return fetch_objects(uri, _cache(), headers_only=headers_only)
        case scheme:
            name = f"{scheme}:// is no source" if scheme else f"{uri!r} has no scheme"
            raise ModelError("UnsupportedSource", f"{name}; what works now: {SUPPORTED}")
    if not located.exists():
        raise ModelError("WeightsMissing", f"{uri}: there is no {located}{_neighbours(located)}")
    return located


def _cache() -> Path:
    return Path(os.environ.get(ENV_MODEL_CACHE) or DEFAULT_CACHE).expanduser()


def _within(root: Path, path: str, uri: str) -> Path:
    located = root / path.lstrip("/")
    if ".." in Path(path).parts:
        raise ModelError("UnsupportedSource", f"{uri} leaves its root: write a path without '..'")
    return located


def _package_root(name: str, uri: str) -> Path:
    if not name:
        raise ModelError("UnsupportedSource", f"{uri} names no package: package://NAME/path")
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            "WeightsMissing",
            f"{uri}: no Python package {name} is installed in this image; add it to the image",
        ) from None
    roots = {file.parts[0] for file in files if len(file.parts) > 1}
    tops = sorted(root for root in roots if not root.endswith(".dist-info"))
    if not tops:
        raise ModelError("WeightsMissing", f"{uri}: the package {name} carries no folder of files")
    return Path(str(importlib.metadata.distribution(name).locate_file(tops[0])))


def _neighbours(missing: Path) -> str:
    """What else is there, so that a typing error is seen at once."""
    if not missing.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in missing.parent.iterdir() if entry.name[0] not in "._")
    return f"; beside it: {', '.join(names[:8]) or 'nothing'}"
