"""The decoder that every architecture here is: the whole model in one file.

Pre-norm: RMSNorm, grouped-query attention with rotary embedding over the paged cache, SwiGLU. What
an architecture adds is an option of its configuration. A step's rows are tokens of many sequences;
what belongs together only attention knows. After `modeling_llama.py` of Hugging Face transformers
and its siblings, whose logits it reproduces.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tandem_runtime import kernels
from tandem_runtime.checkpoint.config import MLP_NAMES, ROUTER, ModelConfig, expert_names
from tandem_runtime.checkpoint.quantization import excluded
from tandem_runtime.kernels import AttentionWork, ExpertLinears
from tandem_runtime.model.linear import Linear, Projection, quantized_linear, recordable
from tandem_runtime.model.parallel import ALONE, Ranks, ShardedWeights
from tandem_runtime.model.quantize import quantize, stack
from tandem_runtime.model.rope import rope_tables
from tandem_runtime.model.sharding import Sharding
from tandem_runtime.model.weights import Weights, return_freed_memory


@dataclass(frozen=True)
class Mlp:
    """SwiGLU: down(silu(gate) * up)."""

    gate_up: Projection
    """Gate, then up."""
    down: Projection

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(kernels.silu_mul(self.gate_up(x)))


@dataclass(frozen=True)
class Experts:
    """Several MLPs, of which each token takes the `per_token` that the router likes best."""

    router: Projection
    gate_up: ExpertLinears
    down: ExpertLinears
    per_token: int

    def __call__(self, x: Tensor) -> Tensor:
        weights, experts = kernels.route(self.router(x), self.per_token)
        inner = kernels.silu_mul(
            kernels.grouped_linear(x, self.gate_up, experts, share=self.per_token)
        )
        outer = kernels.grouped_linear(inner, self.down, experts, share=1)
        parts = outer.view(*experts.shape, -1).float() * weights[..., None]
        return parts.sum(1).to(x.dtype)


@dataclass(frozen=True)
class Rows:
    """Of a step, in its layers."""

    residual: Tensor
    """[rows, hidden], to which layers add."""
    cos: Tensor
    sin: Tensor
    """[rows, head dim] of their positions."""


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer."""

    input_norm: Tensor
    qkv: Projection
    """Query, key and value projections, one after the other."""
    output: Projection
    mlp_norm: Tensor
    mlp: Mlp | Experts
    qk_norm: Tensor | None
    """[heads + kv heads, head dim]: norms of query and key."""

    @property
    def recordable(self) -> bool:
        if isinstance(self.mlp, Experts):
            return False
        return all(map(recordable, (self.qkv, self.output, self.mlp.gate_up, self.mlp.down)))


class Decoder:
    """A model on one device, or a rank's share of it (model/sharding.py).

    Args:
        config: its shape.
        weights: where tensors come from.
        context_tokens: positions that will be used.
        device: where it computes.
        ranks: who computes it together.
        quantization: of the layers' linears (model/quantize.py), "none" for as they are;
            embedding, head, norms and routers stay in the weights' dtype.
        exclude: which linears do, too (`checkpoint.quantization.EXCLUDABLE`).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        context_tokens: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        quantization: str = "none",
        exclude: Collection[str] = (),
    ) -> None:
        if ranks.size > 1:
            sharding = Sharding(config, ranks.size)
            weights = ShardedWeights(weights, sharding, ranks.rank)
            config = replace(sharding.local, vocab_size=config.vocab_size)
        self.config = config
        """Of this rank's share, with the whole vocabulary."""
        self.ranks = ranks
        self.device = device
        self.context_tokens = context_tokens
        self.dtype = weights.dtype
        self._scale = config.head_dim**-0.5
        names = config.tensor_shapes().keys()
        load = _Loader(weights, config, names, device, quantization, exclude)
        self._embedding = load.tensor("model.embed_tokens.weight")
        self._layers = [load.layer(index) for index in range(config.layers)]
        self._norm = load.tensor("model.norm.weight")
        self._head = Linear(self._embedding) if config.tied_embeddings else load.dense("lm_head")
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
            cache: the pool, [layers, 2, blocks, kv heads, T, D].
            work: how the rows attend.
            logit_rows: [n] int64, the rows whose logits are wanted.

        Returns:
            [n, vocabulary] float32.
        """
        rows = self.rows(token_ids, positions)
        x = None
        for index, layer_cache in enumerate(cache):
            x = self.layer(index, x, rows, slots, layer_cache, work)
        assert x is not None
        return self.logits(self.normed(x, rows)[logit_rows])

    def rows(self, token_ids: Tensor, positions: Tensor) -> Rows:
        """What a step's rows are before the first layer."""
        residual = self.ranks.embed(token_ids, self._embedding)
        return Rows(residual, self._cos[positions], self._sin[positions])

    def layer(
        self,
        index: int,
        x: Tensor | None,
        rows: Rows,
        slots: Tensor,
        cache: Tensor,
        work: AttentionWork,
    ) -> Tensor:
        """One of them. x and the result: [rows, hidden], what a layer adds to the residual, which
        the next one does; None before the first. `cache` is this layer's."""
        layer, eps = self._layers[index], self.config.rms_eps
        heads, kv_heads, dim = self.config.heads, self.config.kv_heads, self.config.head_dim
        if x is None:
            x = kernels.rms_norm(rows.residual, layer.input_norm, eps)
        else:
            x = kernels.rms_norm(x, layer.input_norm, eps, rows.residual)
        qkv = layer.qkv(x).view(-1, heads + 2 * kv_heads, dim)
        if layer.qk_norm is not None:
            kernels.head_norm(qkv[:, : heads + kv_heads], layer.qk_norm, eps)
        kernels.rope(qkv[:, : heads + kv_heads], rows.cos, rows.sin)
        kernels.store_kv(qkv[:, heads:].view(-1, 2, kv_heads, dim), cache, slots)
        attended = kernels.paged_attention(qkv[:, :heads], cache, work, self._scale)
        x = self.ranks.all_reduce(layer.output(attended.view(-1, heads * dim)))
        x = kernels.rms_norm(x, layer.mlp_norm, eps, rows.residual)
        return self.ranks.all_reduce(layer.mlp(x))

    def normed(self, x: Tensor, rows: Rows) -> Tensor:
        """After the last layer."""
        return kernels.rms_norm(x, self._norm, self.config.rms_eps, rows.residual)

    def logits(self, x: Tensor) -> Tensor:
        """[n, vocabulary] float32 of rows of `normed`."""
        return self.ranks.logits(self._head(x), self.config.vocab_size).float()

    @property
    def recordable(self) -> bool:
        """Whether its layers are nothing but kernels of the CPU's team (kernels/team.py)."""
        if kernels.uses_triton(self.device) or self.ranks.size > 1:
            return False
        return all(layer.recordable for layer in self._layers)


@dataclass(frozen=True)
class _Loader:
    """Makes a model's parts of a checkpoint's tensors; nothing else asks for them."""

    weights: Weights
    config: ModelConfig
    names: Collection[str]
    """Of all tensors that the model has."""
    device: torch.device
    quantization: str
    exclude: Collection[str]

    def tensor(self, *names: str) -> Tensor:
        """These tensors, one after the other."""
        tensors = [self.weights.load(name) for name in names]
        return (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(self.device)

    def dense(self, *names: str) -> Projection:
        """These projections of one input as one, with their biases where the model has them."""
        return Linear(self.tensor(*(f"{name}.weight" for name in names)), self._bias(names))

    def linear(self, *names: str) -> Projection:
        """The same, quantised where the model is. All of them are excluded, or none is."""
        stored = [self.weights.quantized(f"{name}.weight") for name in names]
        whole = self.quantization == "none" or excluded(names[0], self.config.layers, self.exclude)
        if whole and None in stored:
            return self.dense(*names)
        parts = []
        for name, part in zip(names, stored, strict=True):
            if part is None:
                part = quantize(self.tensor(f"{name}.weight"), self.quantization)
            parts.append(part.to(self.device))
        return quantized_linear(stack(parts), self._bias(names), self.weights.dtype)

    def _bias(self, names: tuple[str, ...]) -> Tensor | None:
        biases = [f"{name}.bias" for name in names if f"{name}.bias" in self.names]
        return self.tensor(*biases) if biases else None

    def layer(self, index: int) -> Layer:
        """One decoder layer."""
        return_freed_memory()
        prefix = f"model.layers.{index}."
        return Layer(
            input_norm=self.tensor(f"{prefix}input_layernorm.weight"),
            qkv=self.linear(*(f"{prefix}self_attn.{p}_proj" for p in "qkv")),
            output=self.linear(f"{prefix}self_attn.o_proj"),
            mlp_norm=self.tensor(f"{prefix}post_attention_layernorm.weight"),
            mlp=self._experts(prefix) if self.config.experts else self._mlp(prefix),
            qk_norm=self._qk_norm(prefix) if self.config.qk_norm else None,
        )

    def _mlp(self, prefix: str) -> Mlp:
        gate, up, down = (f"{prefix}{name}" for name in MLP_NAMES)
        return Mlp(self.linear(gate, up), self.linear(down))

    def _experts(self, prefix: str) -> Experts:
        names = [expert_names(index) for index in range(self.config.experts)]
        return Experts(
            router=self.dense(f"{prefix}{ROUTER}"),
            gate_up=self._grouped([(f"{prefix}{gate}", f"{prefix}{up}") for gate, up, _ in names]),
            down=self._grouped([(f"{prefix}{down}",) for _, _, down in names]),
            per_token=self.config.experts_per_token,
        )

    def _grouped(self, names: list[tuple[str, ...]]) -> ExpertLinears:
        if not kernels.uses_triton(self.device):
            return [self.linear(*group) for group in names]
        return torch.stack([self.tensor(*(f"{n}.weight" for n in group)) for group in names])

    def _qk_norm(self, prefix: str) -> Tensor:
        counts = (("q", self.config.heads), ("k", self.config.kv_heads))
        norms = [
            self.tensor(f"{prefix}self_attn.{name}_norm.weight").expand(count, -1)
            for name, count in counts
        ]
        return torch.cat(norms)
