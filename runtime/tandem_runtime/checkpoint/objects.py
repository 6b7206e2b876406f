"""Models from S3, services that speak its API, and plain HTTP servers. No torch.

`obstore` asks, signs (AWS_* of the environment) and retries. A file is fetched in pieces into
NAME.part, goes on where an earlier attempt stopped, and gets its name when it is whole. The folder
is named after every file's size and ETag, so it never mixes two versions.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import unquote, urlsplit

from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.headers import VERSION, are_large, write_header
from tandem_runtime.checkpoint.progress import Progress
from tandem_runtime.checkpoint.safetensors_header import INDEX

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import HTTPStore, S3Store

    Store = HTTPStore | S3Store

BESIDE_WEIGHTS: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip
WEIGHTS: Final = (".gguf", ".safetensors")
PIECE_BYTES: Final = 1 << 26
FILES_AT_ONCE: Final = 4
ATTEMPTS: Final = 5
_RETRIES: Final = 4
"""Of a request within an attempt, after growing pauses."""
_REFUSAL: Final = re.compile(r"status code: (4\d\d)")
"""Of a listing, which obstore has no classes for."""
Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


def fetch_objects(uri: str, cache: Path, *, headers_only: bool = False) -> Path:
    """The .gguf or .safetensors file, or the folder, that an s3:// or http(s):// URI names.

    Raises:
        ModelError: and what to do about it.
    """
    from filelock import FileLock

    parts = urlsplit(uri)
    if parts.query or parts.fragment or not parts.netloc:
        raise ModelError(
            "UnsupportedSource",
            f"{uri}: write s3://BUCKET/PATH or https://HOST/PATH, without ? and #",
        )
    path = unquote(parts.path).strip("/")
    root, file = path, ""
    if path.endswith(WEIGHTS):
        root, _, file = path.rpartition("/")
    with _told(uri):
        store = _store(parts.scheme, parts.netloc, root)
        found = _listed(store, file) if parts.scheme == "s3" else _asked(store, file)
        if not any(name.endswith(WEIGHTS) for name in found):
            raise FileNotFoundError(f"{file or '.safetensors file'} at {uri}")
        weights = {n: m["size"] for n, m in found.items() if n.endswith(WEIGHTS)}
        version = _version(uri, found)
        headers_only = headers_only and are_large(weights)
        folder = cache / ("headers" if headers_only else "objects") / version
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if headers_only:
                (folder / VERSION).write_text(version)
                for name in weights:
                    _fetch_header(store, folder / name, found.pop(name))
            _fetch_all(store, found, folder)
    return folder / file if file else folder


def _store(scheme: str, host: str, root: str) -> Store:
    from obstore.store import HTTPStore, S3Store

    options: Any = {"allow_http": True, "timeout": "10m", "connect_timeout": "10s"}
    retries: Any = {"max_retries": _RETRIES, "retry_timeout": timedelta(minutes=3)}
    if scheme == "s3":
        return S3Store(host, prefix=root or None, client_options=options, retry_config=retries)
    url = f"{scheme}://{host}/{root}"
    return HTTPStore.from_url(url, client_options=options, retry_config=retries)


def _listed(store: Store, file: str) -> dict[str, ObjectMeta]:
    """What is wanted of a folder that can be listed."""
    import obstore

    found = _again(lambda: obstore.list_with_delimiter(store))["objects"]
    return {meta["path"]: meta for meta in found if _wanted(meta["path"], file)}


def _wanted(name: str, file: str) -> bool:
    if file.endswith(".gguf"):
        return name == file
    weights = name == file if file else not name.startswith("consolidated")
    return name in (*BESIDE_WEIGHTS, INDEX) or (name.endswith(".safetensors") and weights)


def _asked(store: Store, file: str) -> dict[str, ObjectMeta]:
    """The same where each file has to be asked for."""
    import obstore

    found: dict[str, ObjectMeta] = {}

    def ask(*names: str) -> None:
        for name in names:
            try:
                found[name] = obstore.head(store, name)
            except FileNotFoundError:
                log.info("there is no %s", name)

    if file:
        ask(file, *(BESIDE_WEIGHTS if file.endswith(".safetensors") else ()))
        return found
    ask(*BESIDE_WEIGHTS, INDEX)
    if INDEX in found:
        index = json.loads(_again(lambda: bytes(obstore.get(store, INDEX).bytes())))
        shards = sorted(set(index["weight_map"].values()))
        if any("/" in name for name in shards):
            raise ModelError("WeightsCorrupt", f"{INDEX} names shards in other folders")
        ask(*shards)
    else:
        ask("model.safetensors")
    return found


def _version(uri: str, found: dict[str, ObjectMeta]) -> str:
    versions = [(n, m["size"], m["e_tag"] or str(m["last_modified"])) for n, m in found.items()]
    return blake2b(repr((uri, sorted(versions))).encode(), digest_size=16).hexdigest()


def _fetch_all(store: Store, found: dict[str, ObjectMeta], folder: Path) -> None:
    missing = {name: meta for name, meta in found.items() if not (folder / name).exists()}
    progress = Progress("fetched", sum(meta["size"] for meta in missing.values()))
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        fetch = partial(_fetch, store, folder, progress.add)
        for _ in pool.map(fetch, missing, missing.values()):
            pass


def _fetch_header(store: Store, path: Path, meta: ObjectMeta) -> None:
    if not path.exists():
        write_header(path, meta["size"], partial(_piece, store, path.name, meta))


def _fetch(
    store: Store, folder: Path, add: Callable[[int], None], name: str, meta: ObjectMeta
) -> None:
    part = folder / f"{name}.part"
    with part.open("ab") as file:
        add(file.tell())
        while (start := file.tell()) < meta["size"]:
            piece = _piece(store, name, meta, start, min(start + PIECE_BYTES, meta["size"]))
            file.write(piece)
            add(len(piece))
    part.rename(folder / name)


def _piece(store: Store, name: str, meta: ObjectMeta, start: int, end: int) -> bytes:
    import obstore

    tag = meta["e_tag"]
    options: Any = {"range": (start, end)}
    if tag and not tag.startswith("W/"):
        options["if_match"] = tag
    return _again(lambda: bytes(obstore.get(store, name, options=options).bytes()))


def _again(ask: Callable[[], Answer]) -> Answer:
    """Ask up to `ATTEMPTS` times: obstore itself repeats requests, but not every broken answer."""
    from obstore import exceptions

    for left in reversed(range(ATTEMPTS)):
        try:
            return ask()
        except exceptions.GenericError as error:
            if left == 0 or _REFUSAL.search(str(error)):
                raise
            log.warning("%s; trying again", _line(error))
    raise AssertionError("unreachable")


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Turns what obstore raises into sentences."""
    from obstore import exceptions

    try:
        yield
    except FileNotFoundError as error:
        raise ModelError("WeightsMissing", f"there is no {_line(error)}") from error
    except (exceptions.BaseError, OSError, ValueError, KeyError) as error:
        refusal = _REFUSAL.search(str(error))
        if refusal and refusal[1] == "404":
            raise ModelError("WeightsMissing", f"{uri}: there is no such bucket") from error
        denied = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        if isinstance(error, denied) or (refusal and refusal[1] in ("401", "403")):
            raise ModelError(
                "SourceUnauthorized",
                f"{uri}: access is refused: {_line(error)}. Set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (in the Secret of the source's secretRef), or "
                "AWS_SKIP_SIGNATURE=true for a public bucket",
            ) from error
        raise ModelError(
            "SourceUnreachable",
            f"{uri} cannot be fetched: {_line(error)}. Check the network, the room on the disk "
            "and, for s3://, AWS_ENDPOINT_URL and AWS_REGION",
        ) from error


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
