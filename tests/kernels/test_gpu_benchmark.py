"""The GPU's benchmark is ready for the day a GPU is there: its dry run does all of its work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.idle import Event, between_graphs_us
from benchmarks.gpu.offline import read_lengths

SECTIONS = (
    "tiles",
    "decode attention",
    "decode step",
    "prefill of",
    "GPU idle",
    "6 requests offline, synthetic",
    "prefill attention",
    "RMSNorm",
    "sampling",
    "transformers, static cache",
    "transformers, generate_batch",
)


def test_dry_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "the rest is left out" not in done.stdout
    names = [target["name"] for target in json.loads(done.stdout.splitlines()[-1])["targets"]]
    for part in SECTIONS:
        assert any(name.startswith(part) for name in names), part
    fp8 = [line for line in done.stdout.splitlines() if "fp8 weights" in line]
    assert fp8, "measured, or said that this version has none"


def test_idle_time_is_what_no_kernel_or_copy_covers_between_two_replays() -> None:
    def replay(start_us: float, launch: int) -> list[Event]:
        return [Event(start_us + 2 * i, start_us + 2 * i + 1, launch) for i in range(32)]

    # Replays end at 63 and 163; sampling 65..75, a copy that overlaps it 70..80.
    others = [Event(65, 75, 7), Event(70, 80, 8)]
    events = sorted([*replay(0, 1), *others, *replay(100, 2)])
    assert between_graphs_us(events) == (100 - 63) - (80 - 65)
    with pytest.raises(ValueError, match="1 replays"):
        between_graphs_us(replay(0, 1))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.csv", "timestamp_ms,input_tokens,output_tokens\n0,374,44\n1,396,109\n"),
        ("azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\na,374,44\nb,396,109\n"),
        ("mooncake.jsonl", '{"input_length": 374, "output_length": 44}\n' * 2),
        ("burst.csv", "Timestamp,Model,Request tokens,Response tokens\n5,m,374,44\n6,m,396,1\n"),
    ],
)
def test_a_trace_s_lengths_in_its_own_format(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_lengths(tmp_path / name, 1) == [(374, 44)]
    assert len(read_lengths(tmp_path / name, 9)) == 2


def test_a_trace_without_lengths_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rate.csv").write_text("window_s,rate\n0,1\n")
    with pytest.raises(ValueError, match="says how long a request is"):
        read_lengths(tmp_path / "rate.csv", 1)


def test_without_a_gpu_it_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=Path(__file__).parents[2],
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "--dry-run" in done.stderr
