"""The decoder that every architecture here is: the whole model in one file.

Pre-norm: RMSNorm, grouped-query attention with rotary embedding over the paged cache, SwiGLU. What
an architecture adds is an option of its configuration. A step's rows are tokens of many sequences;
what belongs together only attention knows. After `modeling_llama.py` of Hugging Face transformers
and its siblings, whose logits it reproduces.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem_runtime import kernels
from tandem_runtime.checkpoint.config import ModelConfig
from tandem_runtime.kernels import AttentionWork, LayerCache
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


class Decoder:
    """A model on one device.

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
        load = _Loader(weights, config.tensor_shapes().keys(), device)
        self._embedding = load.tensor("model.embed_tokens.weight")
        self._layers = [load.layer(index) for index in range(config.layers)]
        self._norm = load.tensor("model.norm.weight")
        self._head = Linear(self._embedding) if config.tied_embeddings else load.linear("lm_head")
        factors = weights.rope_factors()
        cos, sin = rope_tables(config, context_tokens, factors)
        self._cos, self._sin = cos.to(device), sin.to(device)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: list[LayerCache],
        work: AttentionWork,
        logit_rows: Tensor,
    ) -> Tensor:
        """Compute a step and store its KV.

        Args:
            token_ids, positions, slots: [rows] int64 each; slots say where KV goes in the cache.
            cache: `kernels.layer_caches` of the pool.
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


@dataclass(frozen=True)
class _Loader:
    """Makes a model's parts of a checkpoint's tensors; nothing else asks for them."""

    weights: Weights
    names: Collection[str]
    """Of all tensors that the model has."""
    device: torch.device

    def tensor(self, *names: str) -> Tensor:
        """These tensors, one after the other."""
        tensors = [self.weights.load(name) for name in names]
        return (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(self.device)

    def linear(self, *names: str) -> Linear:
        """These projections of one input as one, with their biases where the model has them."""
        weight = self.tensor(*(f"{name}.weight" for name in names))
        biases = [f"{name}.bias" for name in names if f"{name}.bias" in self.names]
        return Linear(weight, self.tensor(*biases) if biases else None)

    def layer(self, index: int) -> Layer:
        """One decoder layer."""
        prefix = f"model.layers.{index}."
        return Layer(
            input_norm=self.tensor(f"{prefix}input_layernorm.weight"),
            qkv=self.linear(*(f"{prefix}self_attn.{p}_proj" for p in "qkv")),
            output=self.linear(f"{prefix}self_attn.o_proj"),
            mlp_norm=self.tensor(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self.linear(f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"),
            down=self.linear(f"{prefix}mlp.down_proj"),
        )
