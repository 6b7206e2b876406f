"""`tandem plan` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tandem.cli import app
from typer.testing import CliRunner

LLAMA_405B = Path(__file__).parents[1] / "model" / "llama-3.1-405b.json"
FROM_FILE = ["plan", "--model", str(LLAMA_405B), "--weights", "fp8", "--ttft-ms", "2000"]


def test_the_table_shows_each_formula_with_its_numbers() -> None:
    answer = CliRunner().invoke(app, [*FROM_FILE, "--tier", "host=512Gi"])
    assert answer.exit_code == 0, answer.output
    assert "llama-3.1-405b on H100: prefill 1 x 8 GPUs, decode 1 x 8 GPUs, 48 $/h" in answer.output
    assert "2 x 126 x 8 x 128 x 2" in answer.output
    assert "516.1 kB" in answer.output


def test_json_has_the_plan_and_every_line() -> None:
    answer = CliRunner().invoke(app, [*FROM_FILE, "--output", "json", "--price", "1.5"])
    plan = json.loads(answer.output)
    assert plan["decode"]["gpus_per_replica"] == 8
    assert plan["usd_per_hour"] == 24
    lines = {line["name"]: line for line in plan["lines"]}
    assert lines["weights"]["value"] == 410_056_065_024
    assert lines["TPOT, p95"]["value"] == plan["decode"]["tpot_s"]


def test_a_refusal_is_one_sentence_and_status_1() -> None:
    answer = CliRunner().invoke(app, ["plan", "--model", str(LLAMA_405B)])
    assert answer.exit_code == 1
    assert "does not fit a node of 8 H100" in answer.output
    assert "Traceback" not in answer.output


def test_a_model_must_be_named() -> None:
    answer = CliRunner().invoke(app, ["plan"])
    assert answer.exit_code == 1
    assert "which model? Give --model with a config.json" in answer.output


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    answer = CliRunner().invoke(app, ["plan", "--model", str(tmp_path)])
    assert answer.exit_code == 1
    assert "architecture MambaForCausalLM is not supported" in answer.output


@pytest.mark.parametrize(
    "option",
    ["--requests-per-second=nan", "--requests-per-second=0", "--ttft-ms=nan", "--tpot-ms=-1",
     "--percentile=100", "--prompt-cv=nan", "--price=-1", "--gpus-per-node=0", "--tier=host",
     "--weights=fp3", "--gpu=H900", "--cached-tokens=2000", "--max-running=0"],
)  # fmt: skip
def test_a_senseless_number_is_refused_with_a_sentence(option: str) -> None:
    answer = CliRunner().invoke(app, [*FROM_FILE, option])
    assert answer.exit_code == 1
    assert len(answer.output.strip().splitlines()) == 1
    assert isinstance(answer.exception, SystemExit)
