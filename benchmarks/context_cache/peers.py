"""Two pods and a gateway that names the one to the other, which computes all prompts."""

from __future__ import annotations

import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.engine_cpu.pod import PodProcess, pod
from benchmarks.migration import SECRET, Shown, gateway

_TOLD_S: Final = 60.0


@dataclass(frozen=True)
class Neighbours:
    asking: PodProcess
    url: str
    """Of a gateway that sends every prompt to that pod."""


@contextmanager
def neighbours(
    small: Sequence[str], source: Sequence[str], fill: Callable[[str], None], pages: int
) -> Iterator[Neighbours]:
    """Args:
    small: flags of the pod that asks.
    source: flags of the one that is asked.
    fill: makes the pod at a URL hold what is going to be asked for.
    pages: that it then holds.
    """
    with ExitStack() as stack:
        secret = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "secret"
        secret.write_bytes(SECRET)
        flags = ("--peer-tier", f"--handoff-secret-file={secret}")
        asked = stack.enter_context(pod(*flags, *source, name="asked"))
        asking = stack.enter_context(pod(*flags, *small, name="asking"))
        shown = Shown()
        url = stack.enter_context(gateway(shown))
        shown.show([asked])
        fill(asked.url)
        deadline_s = time.monotonic() + _TOLD_S
        while (known := _known_pages(url)) < pages:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the gateway knows {known} of {pages} pages")
            time.sleep(0.1)
        shown.show([asked, asking], leaving=0)
        yield Neighbours(asking, url)


def _known_pages(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    name = "tandem_gateway_known_pages"
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
