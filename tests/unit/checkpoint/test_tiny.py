"""The tiny generated model, as a user writes and serves it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tandem_runtime.checkpoint import tiny
from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.checkpoint.source import resolve_source
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.frontend.chat import ChatTemplate
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.protocol import Sampling
from tandem_runtime.serve.model import read_bundle


def test_it_serves_text_of_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tiny", str(tmp_path / "a" / "tiny")])
    tiny.main()
    uri = capsys.readouterr().out.strip()
    bundle = read_bundle(open_checkpoint(resolve_source(uri)))
    assert bundle.chat_template is not None
    assert ChatTemplate(bundle.chat_template, bundle.special_tokens)
    tokenizer = Tokenizer(bundle)
    prompt = tokenizer.encode("Was für ein Tag!")
    assert len(prompt) == len("Was für ein Tag!".encode())  # a token for each byte
    engine = build_engine(EngineConfig(uri, kv_cache_tokens=1024))
    engine.add(Request("s", prompt, Sampling(max_tokens=64, temperature=1.0, seed=7)))
    tokens: list[SampledToken] = []
    while engine.has_work:
        tokens += [s.token for s in engine.step().streams if s.token is not None]
    text = tokenizer.decode([token.token_id for token in tokens])
    assert len(text) == 64  # it does not end by itself
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz ")
    assert len(set(text)) > 4
