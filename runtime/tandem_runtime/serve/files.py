"""Texts on volumes that this pod mounts, read for a gateway, which has none."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tandem_runtime.contract import MAX_CONTEXT_BYTES, PVC_DIR
from tandem_runtime.frontend.errors import BadRequest

_SCHEME: Final = "pvc://"


def claim_text(uri: str, root: Path = Path(PVC_DIR)) -> str:
    """The text of pvc://CLAIM/PATH. Raises `BadRequest` with a sentence."""
    if not uri.isprintable():
        raise BadRequest("uri has characters that no name of a file here has.", param="uri")
    path = (root / uri.removeprefix(_SCHEME)).resolve()
    if not uri.startswith(_SCHEME) or not path.is_relative_to(root.resolve()):
        raise BadRequest(f"{uri} names no file below {root}; write pvc://CLAIM/PATH.", param="uri")
    claim = uri.removeprefix(_SCHEME).partition("/")[0]
    if not (root / claim).is_dir():
        raise BadRequest(
            f"The claim '{claim}' is not mounted here: mount it in the fleet's pods at "
            f"{root}/{claim}.",
            param="uri",
        )
    try:
        if path.stat().st_size > MAX_CONTEXT_BYTES:
            raise BadRequest(f"{uri} is larger than {MAX_CONTEXT_BYTES} bytes.", param="uri")
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"{uri} is no text in UTF-8.", param="uri") from None
    except OSError as error:
        raise BadRequest(f"{uri} cannot be read: {error.strerror}.", param="uri") from None
