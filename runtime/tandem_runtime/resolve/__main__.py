"""`python -m tandem_runtime.resolve --uri URI --dtype DTYPE [OPTIONS]`.

Prints the report and, where `--out` can be written, leaves it there for the kubelet to pick up.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from tandem_runtime.checkpoint.quantization import EXCLUDABLE, WEIGHT_FORMATS
from tandem_runtime.contract import EXIT_BAD_CONFIG, TERMINATION_LOG
from tandem_runtime.kv.layout import ITEM_BYTES, KV_FORMATS
from tandem_runtime.resolve.report import MAX_BYTES, resolve


def main(arguments: list[str] | None = None) -> int:
    """Resolve one model; 0, or `EXIT_BAD_CONFIG` when it cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m tandem_runtime.resolve", description=__doc__)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--dtype", required=True, choices=list(ITEM_BYTES))
    parser.add_argument("--weights", default="none", choices=WEIGHT_FORMATS)
    parser.add_argument("--weights-exclude", action="append", default=[], choices=EXCLUDABLE)
    parser.add_argument("--kv-cache", default="auto", choices=KV_FORMATS)
    parser.add_argument("--max-context-tokens", type=int)
    parser.add_argument("--out", type=Path, default=Path(TERMINATION_LOG))
    options = parser.parse_args(arguments)
    if options.max_context_tokens is not None and options.max_context_tokens < 1:
        parser.error(f"--max-context-tokens is {options.max_context_tokens}: give at least 1")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tandem_runtime").setLevel(logging.INFO)
    report = resolve(
        options.uri,
        options.dtype,
        options.max_context_tokens,
        options.weights,
        options.kv_cache,
        options.weights_exclude,
    )
    text = json.dumps(report, ensure_ascii=False).encode(errors="replace")
    assert len(text) <= MAX_BYTES
    print(text.decode())
    try:
        options.out.write_bytes(text)
    except OSError as error:
        print(f"{options.out} cannot be written: {error}", file=sys.stderr)
    return 0 if report["ok"] else EXIT_BAD_CONFIG


if __name__ == "__main__":
    sys.exit(main())
