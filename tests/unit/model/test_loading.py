"""How much memory loading takes, and what it says meanwhile."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tandem_runtime.checkpoint import progress
from tandem_runtime.checkpoint.config_json import config_from_json
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.checkpoint.quantization import loaded_bytes
from tandem_runtime.model.weights import open_weights

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "vocab_size": 1024,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
MEASURE = """
import sys, torch
from pathlib import Path
from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.model.linear import Linear
from tandem_runtime.model.weights import open_weights

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

checkpoint = open_checkpoint(Path(sys.argv[1]))
cpu = torch.device("cpu")
with torch.inference_mode():
    Linear(torch.zeros(64, 64, dtype=torch.bfloat16))(torch.zeros(4, 64, dtype=torch.bfloat16))
    before = peak_bytes()
    weights = open_weights(checkpoint, torch.bfloat16)
    model = Decoder(checkpoint.config, weights, 128, cpu, quantization=sys.argv[2])
print(peak_bytes() - before)
"""


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A shard of zeros that takes no disk; returns its bytes."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.parametrize("weights", ["none", "int8", "int4"])
def test_the_peak_is_the_weights_and_at_most_one_shard(tmp_path: Path, weights: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shapes = config_from_json(CONFIG, ()).tensor_shapes()
    sizes = []
    for shard in range(4):
        others = {n: s for n, s in shapes.items() if "layers" not in n and shard == 0}
        layers = {n: s for n, s in shapes.items() if n.startswith("model.layers.")}
        mine = {n: s for n, s in layers.items() if int(n.split(".")[2]) // 2 == shard}
        sizes.append(write_shard(tmp_path / f"model-{shard}.safetensors", others | mine))
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), weights], capture_output=True, text=True
    )
    assert measured.returncode == 0, measured.stderr
    peak = int(measured.stdout)
    held = loaded_bytes(config_from_json(CONFIG, ()), weights, item_bytes=2)
    assert held * 0.9 < peak < held + max(sizes)


def test_progress_is_told(
    tiny_checkpoint: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "PERIOD_S", 0.0)
    checkpoint = open_checkpoint(tiny_checkpoint())
    weights = open_weights(checkpoint, torch.float32)
    with caplog.at_level(logging.INFO):
        for name in checkpoint.config.tensor_shapes():
            weights.load(name)
    assert len(caplog.messages) == len(checkpoint.config.tensor_shapes())
    assert "(100 %)" in caplog.messages[-1]
    assert "(100 %)" not in caplog.messages[-2]


def test_a_file_that_shrinks_meanwhile_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    weights = open_weights(open_checkpoint(folder), torch.float32)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ModelError, match="became shorter while it was read"):
        weights.load("model.layers.1.mlp.down_proj.weight")
