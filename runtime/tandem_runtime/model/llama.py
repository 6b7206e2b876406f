"""The Llama architecture: the whole model in one file.

Pre-norm decoder: RMSNorm, grouped-query attention with rotary embedding over the paged cache,
SwiGLU. A step's rows are tokens of many sequences; what belongs together only attention knows.
After `modeling_llama.py` of Hugging Face transformers, whose logits it reproduces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem_runtime import kernels
from tandem_runtime.checkpoint.config import ModelConfig
from tandem_runtime.kernels import AttentionWork
from tandem_runtime.model.linear import Linear
from tandem_runtime.model.rope import rope_tables
from tandem_runtime.model.weights import Weights


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer."""

    input_norm: Tensor
    qkv: Linear
    """Query, key and value projections, one after the other."""
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    """Gate, then up."""
    down: Linear


class Llama:
    """A Llama model on one device.

    Args:
        config: its shape.
        weights: where tensors come from.
        context_tokens: positions that will be used.
        device: where it computes.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, context_tokens: int, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self.context_tokens = context_tokens
        self._scale = config.head_dim**-0.5

        def load(*names: str) -> Tensor:
            tensors = [weights.load(name) for name in names]
            return (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(device)

        self._embedding = load("model.embed_tokens.weight")
        self._layers = [
            Layer(
                input_norm=load(f"{prefix}input_layernorm.weight"),
                qkv=Linear(load(*(f"{prefix}self_attn.{p}_proj.weight" for p in "qkv"))),
                output=Linear(load(f"{prefix}self_attn.o_proj.weight")),
                mlp_norm=load(f"{prefix}post_attention_layernorm.weight"),
                gate_up=Linear(
                    load(f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
                ),
                down=Linear(load(f"{prefix}mlp.down_proj.weight")),
            )
            for prefix in (f"model.layers.{index}." for index in range(config.layers))
        ]
        self._norm = load("model.norm.weight")
        head = self._embedding if config.tied_embeddings else load("lm_head.weight")
        self._head = Linear(head)
        factors = weights.rope_factors()
        cos, sin = rope_tables(config, context_tokens, factors)
        self._cos, self._sin = cos.to(device), sin.to(device)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: Tensor,
        work: AttentionWork,
        logit_rows: Tensor,
    ) -> Tensor:
        """Compute a step and store its KV.

        Args:
            token_ids, positions, slots: [rows] int64 each; slots say where KV goes in the cache.
            cache: [layers, 2, blocks, kv heads, block tokens, head dim].
            work: how the rows attend.
            logit_rows: [n] int64, the rows whose logits are wanted.

        Returns:
            [n, vocabulary] float32.
        """
        config, eps = self.config, self.config.rms_eps
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        cos, sin = self._cos[positions], self._sin[positions]
        residual = self._embedding[token_ids]
        x = kernels.rms_norm(residual, self._layers[0].input_norm, eps)
        for index, layer in enumerate(self._layers):
            if index > 0:
                x = kernels.rms_norm(x, layer.input_norm, eps, residual)
            qkv = layer.qkv(x).view(-1, heads + 2 * kv_heads, dim)
            kernels.rope(qkv[:, : heads + kv_heads], cos, sin)
            kernels.store_kv(qkv[:, heads:].view(-1, 2, kv_heads, dim), cache[index], slots)
            attended = kernels.paged_attention(qkv[:, :heads], cache[index], work, self._scale)
            x = layer.output(attended.view(-1, heads * dim))
            x = kernels.rms_norm(x, layer.mlp_norm, eps, residual)
            x = layer.down(kernels.silu_mul(layer.gate_up(x)))
        x = kernels.rms_norm(x, self._norm, eps, residual)
        return self._head(x[logit_rows]).float()
