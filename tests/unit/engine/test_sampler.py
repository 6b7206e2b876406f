"""Bias, penalties and grammars on the logits, against their definitions in plain Python."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import torch
from small_vocabulary import byte_bundle
from tandem_runtime.engine.batch import SampleRow
from tandem_runtime.engine.grammar import Grammars
from tandem_runtime.engine.sampler import sample
from tandem_runtime.engine.sequence import RequestRefused
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.protocol import Sampling

VOCABULARY = 50
PROMPT = [1, 2, 2, 3]
OUTPUT = [3, 4, 4, 4, 5]


def row(
    output: Sequence[int] = OUTPUT, *, prompt: Sequence[int] = PROMPT, **sampling: Any
) -> SampleRow:
    asked = Sampling(**{"max_tokens": 99, "temperature": 0.0, **sampling})
    # The engine's list may have grown since the row was planned: the rest is not to be looked at.
    ids = [*prompt, *output, 17, 17]
    position = len(prompt) + len(output)
    return SampleRow(0, position, asked, asked.adjusts_logits, len(prompt), ids)


def defined(logits: list[float], asked: SampleRow) -> list[float]:
    """vLLM's: bias, repetition over prompt and output, frequency and presence over the output."""
    sampling = asked.sampling
    output = asked.token_ids[asked.prompt_tokens : asked.position]
    bias = dict(sampling.logit_bias)
    result = []
    for token, value in enumerate(logits):
        x = value + bias.get(token, 0.0)
        if token in sampling.stop_token_ids and len(output) < sampling.min_tokens:
            x = -math.inf
        if token in asked.token_ids[: asked.position]:
            x = x / sampling.repetition_penalty if x > 0 else x * sampling.repetition_penalty
        count = output.count(token)
        result.append(
            x - sampling.frequency_penalty * count - sampling.presence_penalty * bool(count)
        )
    return result


ASKED: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.9},
    {"logit_bias": ((4, -100.0), (20, 3.0))},
    {"min_tokens": 6, "stop_token_ids": (3, 20, 10**6)},
    {"min_tokens": 5, "stop_token_ids": (3, 20)},
    {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": ((4, 2.0), (1, -2.0), (20, -7.0)),
        "min_tokens": 99,
        "stop_token_ids": (6, 7),
    },
]


@pytest.mark.parametrize("asked", ASKED)
def test_each_adjustment_is_its_definition(asked: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(1, VOCABULARY, generator=random) * 2
        one = row(**asked)
        expected = defined(logits[0].tolist(), one)
        [token] = sample(logits, [one])
        assert logits[0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert token is not None
        assert token.token_id == expected.index(max(expected))


def test_rows_do_not_touch_each_other_and_log_probabilities_are_raw() -> None:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(len(ASKED), VOCABULARY, generator=random) * 2
    rows = [row(logprobs=2, temperature=0.8, seed=n, **asked) for n, asked in enumerate(ASKED)]
    raw = logits.log_softmax(-1)
    together = sample(logits.clone(), rows)
    for n, one in enumerate(rows):
        assert sample(logits[n : n + 1].clone(), [one]) == [together[n]]
        token = together[n]
        assert token is not None
        assert token.logprob == raw[n, token.token_id]
        assert [t.token_id for t in token.top_logprobs] == raw[n].topk(2).indices.tolist()


def test_an_output_that_is_not_finite_is_none_whatever_is_forbidden() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[0, 20] = math.nan
    tokens = sample(logits, [row(logit_bias=((3, 1.0),)), row(logit_bias=((3, 1.0),))])
    assert tokens[0] is None
    assert tokens[1] is not None
    assert tokens[1].token_id == 3


EOS = 255


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(byte_bundle().tokenizer_json, 256, [EOS])


class TestGrammar:
    SCHEMA = json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    )
    SOURCE = json.dumps({"grammars": [{"json_schema": json.loads(SCHEMA)}]})

    def generate(self, grammars: Grammars, output: Sequence[int], seed: int) -> list[int]:
        """From random logits, on from `output` to the end token, as an engine would."""
        grammar, ids = grammars.compile(self.SOURCE), list(output)
        asked = Sampling(max_tokens=99, seed=seed, grammar=self.SOURCE)
        while not ids or ids[-1] != EOS:
            random = torch.Generator().manual_seed(1000 * seed + len(ids))
            logits = torch.randn(1, 256, generator=random)
            one = SampleRow(0, len(PROMPT) + len(ids), asked, True, 4, [*PROMPT, *ids], grammar)
            [token] = sample(logits, [one])
            assert token is not None
            ids.append(token.token_id)
            assert len(ids) < 400
        return ids

    @pytest.mark.parametrize("seed", range(3))
    def test_the_output_validates_and_replays_from_every_position(
        self, grammars: Grammars, seed: int
    ) -> None:
        ids = self.generate(grammars, [], seed)
        text = Tokenizer(byte_bundle()).decode(ids[:-1])
        jsonschema.validate(json.loads(text), json.loads(self.SCHEMA))
        for done in range(len(ids)):
            assert self.generate(grammars, ids[:done], seed) == ids

    def test_free_rows_beside_it_are_free(self, grammars: Grammars) -> None:
        bound = SampleRow(0, 4, Sampling(9, 0.0), True, 4, PROMPT, grammars.compile(self.SOURCE))
        logits = torch.zeros(3, 256)
        logits[:, 200] = 9.0
        tokens = sample(logits, [row(), bound, row()])
        ids = [token.token_id for token in tokens if token is not None]
        assert ids[0] == ids[2] == 200
        assert Tokenizer(byte_bundle()).decode([ids[1]]) in "{ \n\t\r"

    def test_what_cannot_be_compiled(self, grammars: Grammars) -> None:
        wrong = json.dumps({"grammars": [{"json_schema": {"type": "nothing"}}]})
        with pytest.raises(RequestRefused, match="Invalid type: nothing"):
            grammars.compile(wrong)
        endless = Grammars(byte_bundle().tokenizer_json, 256, [])
        with pytest.raises(RequestRefused, match="no end token"):
            endless.compile(self.SOURCE)
