"""Each public format on a few lines of its own, and files that are none."""

from __future__ import annotations

import gzip
from pathlib import Path
from random import Random

import pytest
from tandem.traces.rates import Window, from_rates
from tandem.traces.read import read_trace
from tandem.traces.synthetic import Kind, Synthetic, make_trace
from tandem.traces.trace import Trace, TraceError, cut

PLAIN = "timestamp_ms,input_tokens,output_tokens\n0,68,8\n129,79,12\n500,5,1\n"
HASHED = "timestamp_ms,input_tokens,output_tokens,hash_ids\n0,1100,6,0;1;2\n70,900,4,0;9\n"
AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n"
    "2023-11-16 18:17:04.0319600,3180,8\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-12 00:00:00.001163+00:00,1089,14\n"
    "2024-05-12 00:00:02.501163+00:00,1399,46\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5.0,ChatGPT,472,18,490,Conversation log\n"
    "45.5,GPT-4,1087,0,1087,API log\n"
    "118.0,ChatGPT,417,276,693,Conversation log\n"
)
MOONCAKE = (
    '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
    '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 99]}\n'
)
QWEN = (
    '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 521, '
    '"output_length": 132, "type": "text", "turn": 1, "hash_ids": [1, 2]}\n'
    '{"chat_id": 2, "parent_chat_id": 1, "timestamp": 61.5, "input_length": 20, '
    '"output_length": 7, "type": "text", "turn": 2, "hash_ids": [1]}\n'
)
RATES = (
    "window_start_s,requests_per_s,mean_input_tokens,mean_output_tokens,active_clients\n"
    "0,2.0,100,20,5\n600,4.0,300,40,5\n"
)


def read(folder: Path, text: str, **options: float) -> Trace:
    file = folder / "trace.csv"
    file.write_text(text)
    return read_trace(file, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "arrivals", "prompts", "outputs"),
    [
        (PLAIN, [0, 0.129, 0.5], [68, 79, 5], [8, 12, 1]),
        (HASHED, [0, 0.07], [1100, 900], [6, 4]),
        (AZURE_2023, [0, 0.052], [4808, 3180], [10, 8]),
        (AZURE_2024, [0, 2.5], [1089, 1399], [14, 46]),
        (BURSTGPT, [0, 113.0], [472, 417], [18, 276]),
        (MOONCAKE, [0, 3.053], [6955, 6472], [52, 26]),
        (QWEN, [0, 0.386], [521, 20], [132, 7]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_format(
    tmp_path: Path,
    text: str,
    arrivals: list[float],
    prompts: list[int],
    outputs: list[int],
    packed: bool,
) -> None:
    file = tmp_path / "trace"
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    trace = read_trace(file)
    assert trace.arrival_s == pytest.approx(arrivals, abs=1e-5)
    assert trace.prompt_tokens == prompts
    assert trace.output_tokens == outputs


def test_blocks_are_read_where_the_trace_has_them(tmp_path: Path) -> None:
    assert read(tmp_path, PLAIN).blocks is None
    hashed, mooncake, qwen = (read(tmp_path, text) for text in (HASHED, MOONCAKE, QWEN))
    assert hashed.blocks == [(0, 1, 2), (0, 9)]
    assert mooncake.blocks == [(46, 47), (46, 99)]
    assert [t.block_tokens for t in (hashed, mooncake, qwen)] == [512, 512, 16]


def test_requests_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    trace = read(tmp_path, BURSTGPT)
    assert len(trace) == 2
    assert trace.notes == ("1 requests without tokens left out",)


def test_a_trace_out_of_order_is_sorted(tmp_path: Path) -> None:
    trace = read(tmp_path, PLAIN + "100,7,7\n")
    assert trace.arrival_s == [0, 0.1, 0.129, 0.5]
    assert trace.prompt_tokens == [68, 7, 79, 5]


def test_a_clock_of_whole_ticks_is_spread(tmp_path: Path) -> None:
    lines = "".join(f"{3000 * (i // 4)},{i + 1},1\n" for i in range(40))
    text = "timestamp_ms,input_tokens,output_tokens\n" + lines
    trace = read(tmp_path, text)
    assert len(set(trace.arrival_s)) == 40
    for at_s, tokens in zip(trace.arrival_s, trace.prompt_tokens, strict=True):
        assert 3 * ((tokens - 1) // 4) <= at_s < 3 * ((tokens - 1) // 4) + 3
    assert read(tmp_path, text).arrival_s == trace.arrival_s
    assert read(tmp_path, text, seed=1).arrival_s != trace.arrival_s
    assert "ticks of 3 s" in trace.notes[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty: it holds no request"),
        ("a,b,c\n1,2,3\n", r"line 1: 'a,b,c' begins none of the formats that are read: plain CSV"),
        (PLAIN + "x,1,1\n", r"line 5: 'x,1,1' is no request of a plain CSV trace: could not"),
        (PLAIN + "9,1\n", r"line 5: '9,1' is no request of a plain CSV trace"),
        (PLAIN + "9,-1,1\n", r"line 5: times must be finite and token counts at least 0"),
        (PLAIN + "nan,1,1\n", r"line 5: times must be finite"),
        (PLAIN[:40], "holds no request that was answered"),
        (AZURE_2023 + "yesterday,1,1\n", r"line 4: 'yesterday,1,1' is no request of a Azure trace"),
        (MOONCAKE + '{"timestamp": 1}\n', r"line 3: .* is no request of a Mooncake trace"),
        (MOONCAKE + "[1]\n", r"line 3: '\[1\]' is no request of a Mooncake trace"),
        (QWEN + "{\n", r"line 3: '\{' is no request of a Qwen-Bailian trace"),
        (RATES + "1200,fast,1,1\n", r"line 4: '1200,fast,1,1' is no rate"),
        (RATES + "1200,-1,1,1\n", r"line 4: .* rates at least 0"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(TraceError, match=sentence):
        read(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "missing")
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(PLAIN.encode())[:30])
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(broken)


def test_requests_are_drawn_from_rates(tmp_path: Path) -> None:
    trace = read(tmp_path, RATES)
    assert trace.duration_s == 1200
    early = [t for t, at_s in zip(trace.prompt_tokens, trace.arrival_s, strict=True) if at_s < 600]
    late = [t for t, at_s in zip(trace.prompt_tokens, trace.arrival_s, strict=True) if at_s >= 600]
    assert len(early) == pytest.approx(1200, rel=0.1)
    assert len(late) == pytest.approx(2400, rel=0.1)
    assert sum(early) / len(early) == pytest.approx(100, rel=0.15)
    assert sum(late) / len(late) == pytest.approx(300, rel=0.15)
    assert len(read(tmp_path, RATES, rate_share=0.1)) == pytest.approx(360, rel=0.2)


def test_a_rate_of_millions_says_which_share_to_take() -> None:
    windows = [Window(0, 1e5, 10, 10), Window(600, 1e5, 10, 10)]
    with pytest.raises(TraceError, match=r"take a share of at most 0\.042"):
        from_rates("rates", windows, Random(0))


@pytest.mark.parametrize("kind", list(Kind))
def test_synthetic_load_follows_its_rate(kind: Kind) -> None:
    load = Synthetic(kind, 2.0, 2.0 if kind is Kind.POISSON else 8.0, 3000, 100, 20)
    trace = make_trace(load, seed=5)
    thirds = [sum(1000 * i <= at_s < 1000 * (i + 1) for at_s in trace.arrival_s) for i in range(3)]
    expected = {
        Kind.POISSON: [2000, 2000, 2000],
        Kind.STEP: [2000, 8000, 2000],
        Kind.DIURNAL: [3760, 7480, 3760],
    }[kind]
    assert thirds == pytest.approx(expected, rel=0.1)
    assert make_trace(load, 5) == trace
    assert make_trace(load, 6) != trace


@pytest.mark.parametrize(
    "values", [(-1, 1, 10, 1, 1), (2, 1, 10, 1, 1), (0, 0, 10, 1, 1), (1, 1, 0, 1, 1),
               (1, 1, 10, 0, 1)]
)  # fmt: skip
def test_a_senseless_synthetic_load_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(TraceError):
        Synthetic(Kind.STEP, *values)


def test_a_stretch_of_a_trace_replayed_faster(tmp_path: Path) -> None:
    trace = cut(read(tmp_path, PLAIN), start_s=0.1, length_s=0.4, speed=2)
    assert trace.arrival_s == pytest.approx([0.0145])
    assert trace.duration_s == pytest.approx(0.2)
    assert len(cut(read(tmp_path, PLAIN))) == 3
    with pytest.raises(TraceError, match="has no request from 10 s"):
        cut(trace, start_s=10)
