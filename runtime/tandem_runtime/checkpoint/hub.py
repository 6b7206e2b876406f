"""Models from the Hugging Face Hub, or a mirror that speaks its API. No torch.

`huggingface_hub` fetches: it resumes, renames what is whole into place, and reads HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE. Here is which files, and a sentence for what it may raise.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.headers import VERSION, are_large, write_header
from tandem_runtime.checkpoint.safetensors_header import INDEX

FORM: Final = "hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME[@REVISION]/FILE.gguf"
_URI: Final = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+\.gguf))?/?")
WANTED: Final = ["*.safetensors", "*.json", "*.jinja"]
UNWANTED: Final = ["*/*", "consolidated*"]
"""Other formats of the same weights: in folders, or in one file beside the shards."""
ATTEMPTS: Final = 4
FIRST_PAUSE_S: Final = 1.0
log = logging.getLogger(__name__)


def fetch_from_hub(uri: str, cache: Path, *, headers_only: bool = False) -> Path:
    """The folder of a repository's files, or one GGUF file, in the cache.

    Raises:
        ModelError: and what to do about it.
    """
    # Slow to import, and not needed where models come from elsewhere.
    import huggingface_hub as hub

    parsed = _URI.fullmatch(uri)
    if parsed is None:
        raise ModelError("UnsupportedSource", f"{uri} names no repository: write {FORM}")
    repo, file = parsed[1], unquote(parsed[3] or "")
    revision = unquote(parsed[2]) if parsed[2] else None

    def download() -> str:
        headers = _fetch_headers(repo, revision, file, cache) if headers_only else None
        if headers:
            return headers
        if file:
            return hub.hf_hub_download(repo, file, revision=revision, cache_dir=cache / "hub")
        return hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache / "hub",
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
        )

    located = Path(_patiently(uri, download))
    if not file and not any(located.glob("*.safetensors")):
        raise ModelError(
            "WeightsMissing",
            f"{uri} has no .safetensors files; of GGUF files name one: hf://ORG/NAME/FILE.gguf",
        )
    return located


def _fetch_headers(repo: str, revision: str | None, file: str, cache: Path) -> str | None:
    """Where the headers of a repository's weights are now; None where all had better be fetched."""
    import huggingface_hub as hub

    if _offline():
        return None
    about = hub.HfApi().model_info(repo, revision=revision or "main", files_metadata=True)
    sizes = {entry.rfilename: entry.size or 0 for entry in about.siblings or []}
    wanted = [file] if file in sizes else [name for name in sizes if not file and _is_shard(name)]
    weights = {name: sizes[name] for name in wanted}
    if not are_large(weights):
        return None
    folder = cache / "headers" / f"{repo.replace('/', '--')}-{about.sha}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in {"config.json", "generation_config.json", INDEX} & sizes.keys():
        small = hub.hf_hub_download(repo, name, revision=about.sha, cache_dir=cache / "hub")
        shutil.copy(small, folder / name)
    for name, size in weights.items():
        url = hub.hf_hub_url(repo, name, revision=about.sha)
        write_header(folder / name, size, partial(_read, url))
    (folder / VERSION).write_text(str(about.sha))
    return str(folder / file)


def _is_shard(name: str) -> bool:
    """What WANTED and UNWANTED leave of the weights."""
    return name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")


def _read(url: str, start: int, end: int) -> bytes:
    import huggingface_hub as hub

    asked = {"Range": f"bytes={start}-{end - 1}"}
    token = hub.get_token()
    if token:
        asked["Authorization"] = f"Bearer {token}"
    reply = hub.get_session().get(url, headers=asked, follow_redirects=True)
    hub.hf_raise_for_status(reply)
    return bytes(reply.content)


def _patiently(uri: str, download: Callable[[], str]) -> str:
    for attempt in range(ATTEMPTS):
        try:
            return download()
        except (OSError, ValueError) as error:
            told = _told(uri, error)
            if told.reason != "SourceUnreachable" or attempt == ATTEMPTS - 1 or _offline():
                raise told from error
            log.warning("%s; trying again", told.message)
            time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _told(uri: str, error: Exception) -> ModelError:
    """What an exception of `huggingface_hub` means here; the order is that of its classes."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return ModelError(
            "SourceUnauthorized",
            f"{uri}: access is refused: ask for access on the model's page and set HF_TOKEN (in "
            "the Secret of the source's secretRef) to a token of that account",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return ModelError(
            "SourceUnauthorized",
            f"{uri}: there is no such repository, or it is private: check the name, or set "
            "HF_TOKEN (in the Secret of the source's secretRef) to a token that may read it",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError("WeightsMissing", f"{uri}: the repository has no such revision")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return ModelError("WeightsMissing", f"{uri}: the repository has no such file")
    if isinstance(error, errors.HFValidationError):
        return ModelError("UnsupportedSource", f"{uri}: {what}")
    if _offline():
        return ModelError(
            "SourceUnreachable",
            f"{uri} is not in the cache and HF_HUB_OFFLINE is set: fetch it once online, or unset",
        )
    return ModelError(
        "SourceUnreachable",
        f"{uri} cannot be fetched: {what}. Check the network, the room on the disk and HF_ENDPOINT",
    )
