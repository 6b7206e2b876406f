"""How one engine is set up; frozen and checked, so that a bad value fails before weights load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from tandem_runtime.checkpoint.quantization import EXCLUDABLE, WEIGHT_FORMATS
from tandem_runtime.contract import BLOCK_TOKENS, KV_PAGE_TOKENS
from tandem_runtime.kv.layout import ITEM_BYTES, KV_FORMATS
from tandem_runtime.kv.tiers.stores import check_uri
from tandem_runtime.kv.tiers.tenants import NOBODY, TenantParts
from tandem_runtime.roofline.replica import Replica
from tandem_runtime.roofline.stated import stated_replica

Device = Literal["cpu", "cuda"]
DEFAULT_CPU_KV_BYTES: Final = 1 << 30
_BATCH_TOKENS: Final = {"cpu": 128, "cuda": 2048}
_SWAP_BYTES: Final = {"cpu": 0, "cuda": 4 << 30}
DEFAULT_REMOTE_TTL_S: Final = 86_400
_BLOCK_TOKENS: Final = {"cpu": 64, "cuda": BLOCK_TOKENS}


@dataclass(frozen=True)
class RemoteStore:
    """Where pods share pages of KV."""

    uri: str
    """`valkey://HOST:PORT/DB`, `rediss://...` (TLS), `s3://BUCKET/PREFIX`."""
    ttl_s: int = DEFAULT_REMOTE_TTL_S
    """For which Valkey keeps a page after its last use."""
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    """USERNAME, PASSWORD, CA_CERT; AWS_* for S3."""

    def __post_init__(self) -> None:
        check_uri(self.uri)
        if self.ttl_s < 1:
            raise ValueError(f"ttl_s of the remote tier is {self.ttl_s}: give at least 1")


@dataclass(frozen=True)
class EngineConfig:
    """What `engine.build.build_engine` needs to know."""

    model_uri: str
    """`package://NAME/path`, `file:///path` or `pvc://CLAIM/path`: a .gguf file, a .safetensors
    file or a folder of them with its config.json."""
    dtype: str = "bfloat16"
    """Of activations, and of the KV cache by default: float32, bfloat16 or float16."""
    weights: str = "none"
    """What the layers' linears are quantised to at load: none, fp8, int8 or int4
    (model/quantize.py)."""
    weights_exclude: tuple[str, ...] = ()
    """Linears that are not: attention, first-layer, last-layer."""
    kv_cache: str = "auto"
    """What the KV cache holds: auto for `dtype`, or fp8."""
    device: Device = "cpu"
    threads: int = 1
    """That compute a step together on the CPU, each some of its rows. Ranks have one."""
    tensor_parallel: int = 1
    """Ranks (processes) that share the model; on GPUs each has its own. Memory is the pod's, of
    which each rank takes its share."""
    kv_block_tokens: int | None = None
    """Tokens of a KV block, the grain of prefix hits. None: 16 on a GPU; 64 on the CPU, where a
    block is one operand of a product."""
    max_batch_tokens: int | None = None
    """Rows of one step: how long a prefill chunk may hold up running decodes. None: 128 on the CPU,
    where more rows are no faster a row, 2048 on a GPU, which needs them to be busy."""
    max_running: int = 64
    """Streams that are computed together."""
    max_context_tokens: int | None = None
    """None: the model's own."""
    kv_cache_bytes: int | None = None
    """None: from `kv_cache_percent` of what memory is left beside the weights."""
    kv_cache_tokens: int | None = None
    """The same, in tokens. None: of a paced engine, what the stated accelerator has room for."""
    kv_cache_percent: int = 90
    memory_limit_bytes: int | None = None
    """Of the container, on the CPU; None: unknown, the cache takes at most 1 GiB."""
    swap_bytes: int | None = None
    """Host memory for the KV of preempted streams, which is copied where that is faster than
    computing it again; 0: never. None: 4 GiB on a GPU, 0 on the CPU, where it is the same memory.
    """
    memory_tier_bytes: int = 0
    """Host memory for pages that other prompts may use again; 0: no such tier."""
    memory_tier_tenants: TenantParts = NOBODY
    disk_tier_bytes: int = 0
    """Of files below `disk_tier_dir`; 0: no such tier."""
    disk_tier_dir: str | None = None
    disk_tier_tenants: TenantParts = NOBODY
    remote_tier: RemoteStore | None = None
    """None: no such tier."""
    peer_tier: bool = False
    """Whether pages are asked of other pods of the revision, and given to them."""
    prefix_caching: bool = True
    pace: str | None = None
    """`ACCELERATOR[:MODEL]`: each step takes as long as that model's on that accelerator
    (engine/pace.py). None: as long as it takes."""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(ITEM_BYTES)}")
        if self.weights not in WEIGHT_FORMATS:
            raise ValueError(f"weights {self.weights!r} is none of {', '.join(WEIGHT_FORMATS)}")
        if self.weights_exclude and self.weights == "none":
            raise ValueError(
                "weights_exclude is given, but weights are not quantised: leave it out"
            )
        for kind in self.weights_exclude:
            if kind not in EXCLUDABLE:
                raise ValueError(f"weights_exclude {kind!r} is none of {', '.join(EXCLUDABLE)}")
        if self.kv_cache not in KV_FORMATS:
            raise ValueError(f"kv_cache {self.kv_cache!r} is none of {', '.join(KV_FORMATS)}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device!r} is none of cpu, cuda")
        for name in ("threads", "max_running", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        for name in (
            "max_batch_tokens",
            "max_context_tokens",
            "kv_cache_bytes",
            "kv_cache_tokens",
            "memory_limit_bytes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1, or leave it out")
        if self.kv_cache_bytes is not None and self.kv_cache_tokens is not None:
            raise ValueError("kv_cache_bytes and kv_cache_tokens exclude each other: give one")
        if self.pace is not None and self.device != "cpu":
            raise ValueError(
                f"pace is {self.pace}, but the device is {self.device}: a paced engine computes on "
                "the CPU; leave pace out where there is an accelerator"
            )
        _ = self.stated
        if self.swap_bytes is not None and self.swap_bytes < 0:
            raise ValueError(
                f"swap_bytes is {self.swap_bytes}: give 0 to recompute always, or more"
            )
        for name in ("memory_tier_bytes", "disk_tier_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 for none, or more")
        for name in ("memory", "disk"):
            if getattr(self, f"{name}_tier_tenants") and not getattr(self, f"{name}_tier_bytes"):
                raise ValueError(
                    f"tenants have parts of a {name} tier, but there is none: give its size, too"
                )
        if bool(self.disk_tier_bytes) != bool(self.disk_tier_dir):
            raise ValueError("disk_tier_bytes and disk_tier_dir go together: give both or neither")
        if self.peer_tier and not self.prefix_caching:
            raise ValueError("peer_tier shares what the prefix cache holds: leave that on")
        if not 1 <= self.kv_cache_percent <= 100:
            raise ValueError(f"kv_cache_percent is {self.kv_cache_percent}: give 1 to 100")
        if self.block_tokens < 1 or KV_PAGE_TOKENS % self.block_tokens:
            raise ValueError(
                f"kv_block_tokens is {self.block_tokens}: give a divisor of a page's "
                f"{KV_PAGE_TOKENS}"
            )
        if self.max_running > self.batch_tokens:
            raise ValueError(
                f"max_running is {self.max_running}, but a step has only {self.batch_tokens} "
                "tokens (max_batch_tokens): a running stream needs one in each step"
            )

    @property
    def stated(self) -> Replica | None:
        """Whose time a step takes, where the engine is paced."""
        if self.pace is None:
            return None
        return stated_replica(
            self.pace, gpus=self.tensor_parallel, weights=self.weights, kv_cache=self.kv_cache
        )

    @property
    def stated_name(self) -> str:
        """`ACCELERATOR:MODEL` of `stated`, with their full names; empty where there is none."""
        stated = self.stated
        return "" if stated is None else f"{stated.gpu.name}:{stated.model.shape.name}"

    @property
    def kv_dtype(self) -> str:
        """Of the KV cache, as `KvLayout` names it."""
        return self.dtype if self.kv_cache == "auto" else self.kv_cache

    @property
    def computed(self) -> str:
        """What decides the cache's values beside the model and the cache's dtype."""
        if (self.weights, self.kv_cache) == ("none", "auto"):
            return ""
        excluded = "".join(f" but {kind}" for kind in EXCLUDABLE if kind in self.weights_exclude)
        return f"weights {self.weights}{excluded}, computed in {self.dtype}"

    @property
    def swap_capacity_bytes(self) -> int:
        """`swap_bytes`, or what pays on this device."""
        return _SWAP_BYTES[self.device] if self.swap_bytes is None else self.swap_bytes

    @property
    def batch_tokens(self) -> int:
        """`max_batch_tokens`, or what this device (or the stated one) does best with."""
        device = self.device if self.pace is None else "cuda"
        return self.max_batch_tokens or _BATCH_TOKENS[device]

    @property
    def block_tokens(self) -> int:
        """`kv_block_tokens`, or what this device does best with."""
        return self.kv_block_tokens or _BLOCK_TOKENS[self.device]
