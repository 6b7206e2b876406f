"""A digest of a checkpoint's weights: equal digests mean equal weights.

Up to 1 GiB every byte counts. Above that, reading everything would cost minutes at each start, so
the digest covers the headers (all names, shapes, dtypes and offsets) and, of each tensor, its first
and last 4 KiB and 14 pieces of 4 KiB evenly between. A fine-tune changes all of a tensor's bytes,
so two models do not collide by accident; someone who can write the weights can forge it, and needs
to forge nothing. docs/design/layouts.md says what depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Final

FULL_DIGEST_BYTES: Final = 1 << 30
SAMPLES: Final = 16
SAMPLE_BYTES: Final = 4096
_CHUNK_BYTES: Final = 1 << 22


def weights_digest(config: bytes, files: Iterable[tuple[Path, list[tuple[int, int]]]]) -> str:
    """32 hex digits.

    Args:
        config: what else decides the computation, in a canonical form.
        files: each weights file with the (offset, bytes) of its tensors.
    """
    files = list(files)
    digest = blake2b(config, digest_size=16)
    complete = sum(path.stat().st_size for path, _ in files) <= FULL_DIGEST_BYTES
    for path, tensors in files:
        digest.update(b"|" + path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            pieces = _all(file) if complete else _samples(file, tensors)
            for piece in pieces:
                digest.update(piece)
    return digest.hexdigest()


def _all(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _samples(file: BinaryIO, tensors: list[tuple[int, int]]) -> Iterator[bytes]:
    yield file.read(min((offset for offset, _ in tensors), default=0))
    for offset, nbytes in tensors:
        last = max(nbytes - SAMPLE_BYTES, 0)
        for index in range(SAMPLES):
            file.seek(offset + last * index // (SAMPLES - 1))
            yield file.read(min(SAMPLE_BYTES, nbytes))
