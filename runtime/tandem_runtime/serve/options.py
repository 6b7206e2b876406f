"""The command line of a serving pod, with what the pod's environment adds."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Final

from tandem_runtime import contract
from tandem_runtime.checkpoint.quantization import EXCLUDABLE, WEIGHT_FORMATS
from tandem_runtime.config import DEFAULT_REMOTE_TTL_S, EngineConfig, RemoteStore
from tandem_runtime.contract import Role
from tandem_runtime.frontend.process import BadConfig, read_secret
from tandem_runtime.kv.layout import ITEM_BYTES, KV_FORMATS
from tandem_runtime.kv.tiers.tenants import TenantParts
from tandem_runtime.roofline.stated import DEFAULT_MODEL


@dataclass(frozen=True)
class ServeOptions:
    role: Role
    model_name: str
    served_names: tuple[str, ...]
    engine: EngineConfig
    host: str
    port: int
    grpc_port: int
    handoff_port: int
    secret: bytes
    """Empty for a pod of role `both` that has none: it then serves its own front end only."""
    max_waiting: int
    watchdog_s: float
    pod: str
    uid: str
    """The pod's in the Kubernetes API, where it has one."""
    fleet: str
    revision: str
    hold_s: float = 30.0
    """How long a stream goes on, and what came of it is kept, for another gateway."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults that are None are explained in the text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


_POWERS: Final = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


def _size(text: str) -> int:
    """Bytes, from a Kubernetes quantity."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([kMGTPE]?)|([KMGTPE])i)", text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 64Gi")
    digits, decimal, binary = number.groups()
    unit = 1024 ** _POWERS[binary.replace("K", "k")] if binary else 1000 ** _POWERS[decimal]
    return int(Decimal(digits) * unit)


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="python -m tandem_runtime.serve",
        description="Serve one model on this machine, as a prefill pod, a decode pod or both.",
        formatter_class=_Help,
    )
    model = cli.add_argument_group("model")
    model.add_argument("--role", required=True, choices=list(Role), help="of the pod")
    model.add_argument("--model-name", required=True, help="name of the Model")
    model.add_argument(
        "--served-name", action="append", help="for clients; may be repeated (default: model name)"
    )
    model.add_argument("--model-uri", required=True, help="package://, file:// or pvc://")
    model.add_argument(
        "--dtype", default="bfloat16", choices=sorted(ITEM_BYTES), help="of activations"
    )
    model.add_argument(
        "--weights", default="none", choices=WEIGHT_FORMATS, help="what linears are quantised to"
    )
    model.add_argument(
        "--weights-exclude",
        action="append",
        default=[],
        choices=EXCLUDABLE,
        help="linears that are not quantised; repeatable",
    )
    model.add_argument(
        "--kv-cache", default="auto", choices=KV_FORMATS, help="what it holds; auto: the dtype"
    )
    model.add_argument("--max-context-tokens", type=int, help="default: the model's own")
    engine = cli.add_argument_group("engine")
    engine.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the model")
    engine.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        help="processes (ranks) that share the model, on GPUs one each",
    )
    engine.add_argument(
        "--kv-cache-percent",
        type=int,
        default=90,
        help="of the memory left beside the weights; of 1 GiB on a CPU without a memory limit",
    )
    engine.add_argument("--kv-cache-bytes", type=int, help="instead of a percentage")
    engine.add_argument("--kv-cache-tokens", type=int, help="instead of either")
    engine.add_argument(
        "--pace",
        metavar="ACCELERATOR[:MODEL]",
        help="for trials without accelerators: steps take as long, and as many tokens of KV fit, "
        f"as on that one (h100; MODEL: {DEFAULT_MODEL}, another known one, or a config.json); the "
        "model that runs should be tiny (python -m tandem_runtime.checkpoint.tiny)",
    )
    engine.add_argument(
        "--swap-bytes",
        type=int,
        help="host memory for KV of preempted streams (default: 4 GiB on GPUs, else 0)",
    )
    engine.add_argument(
        "--memory-tier-size", type=_size, default=0, help="of host memory for KV, such as 64Gi"
    )
    engine.add_argument("--disk-tier-size", type=_size, default=0, help="of disk for KV, likewise")
    engine.add_argument("--disk-tier-dir", help="a folder; processes may share it")
    for tier in ("memory", "disk"):
        engine.add_argument(
            f"--{tier}-tier-tenant",
            action="append",
            default=[],
            metavar="FLOOR..QUOTA:NAME",
            help=f"of the {tier} tier, in percent: what is kept for the requests with this "
            f"{contract.HEADER_TENANT}, and what they may have; 25..:NAME and ..50:NAME leave one "
            "out; repeatable",
        )
        engine.add_argument(
            f"--{tier}-tier-default-quota",
            type=int,
            metavar="PERCENT",
            help=f"of the {tier} tier, of each tenant that is not named (default: no limit)",
        )
    engine.add_argument(
        "--remote-tier-uri",
        help="a store of KV that pods share: valkey://HOST:6379, rediss://HOST:6379 for TLS, "
        f"s3://BUCKET/PREFIX; credentials are {contract.ENV_REMOTE_TIER}USERNAME, PASSWORD, "
        "CA_CERT (PEM) and AWS_* in the environment",
    )
    engine.add_argument(
        "--remote-tier-ttl-seconds",
        type=int,
        default=DEFAULT_REMOTE_TTL_S,
        help="for which Valkey or Redis keep a page after its last use",
    )
    engine.add_argument(
        "--peer-tier",
        action="store_true",
        help="ask other pods of the revision for KV that they hold, and give it to them; a gateway "
        "names them, and the handoff secret is what they know each other by",
    )
    engine.add_argument(
        "--max-batch-tokens", type=int, help="rows of one step (default: 128 on CPUs, else 2048)"
    )
    engine.add_argument("--max-running", type=int, default=64, help="streams of one step")
    engine.add_argument("--max-waiting", type=int, default=256, help="streams that may queue")
    engine.add_argument("--threads", type=int, help="default: the CPU limit's whole cores, else 1")
    engine.add_argument("--watchdog-seconds", type=float, default=120.0, help="longest step")
    cli.add_argument(
        "--hold-seconds",
        type=float,
        default=30.0,
        help="how long a stream goes on without its gateway, for another one to take it over",
    )
    network = cli.add_argument_group("network")
    network.add_argument("--host", help=f"default: ${contract.ENV_POD_IP}, else 127.0.0.1")
    network.add_argument("--port", type=int, default=contract.HTTP_PORT, help="of HTTP")
    network.add_argument("--grpc-port", type=int, default=contract.GRPC_PORT, help="of gRPC")
    network.add_argument("--handoff-port", type=int, default=contract.HANDOFF_PORT, help="of KV")
    network.add_argument(
        "--handoff-secret-file",
        type=Path,
        default=Path(contract.HANDOFF_SECRET_DIR) / contract.HANDOFF_SECRET_KEY,
        help="shared by the namespace's gateways and pods",
    )
    return cli


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> ServeOptions:
    """Raises `BadConfig`; argparse itself exits on an unknown flag."""
    args = parser().parse_args(arguments)
    role = Role(args.role)
    secret = read_secret(args.handoff_secret_file, required=role is not Role.BOTH)
    if args.peer_tier and not secret:
        raise BadConfig(
            "--peer-tier needs the handoff secret, by which pods know each other: write one to "
            f"{args.handoff_secret_file}, or leave --peer-tier out"
        )
    return ServeOptions(
        role=role,
        model_name=args.model_name,
        served_names=tuple(args.served_name or [args.model_name]),
        engine=_engine(args, environment),
        host=args.host or environment.get(contract.ENV_POD_IP) or "127.0.0.1",
        port=args.port,
        grpc_port=args.grpc_port,
        handoff_port=args.handoff_port,
        secret=secret,
        max_waiting=args.max_waiting,
        watchdog_s=args.watchdog_seconds,
        pod=environment.get(contract.ENV_POD_NAME, "local"),
        uid=environment.get(contract.ENV_POD_UID, ""),
        fleet=environment.get(contract.ENV_FLEET, ""),
        revision=environment.get(contract.ENV_REVISION, ""),
        hold_s=args.hold_seconds,
    )


def _engine(args: argparse.Namespace, environment: Mapping[str, str]) -> EngineConfig:
    pretended = environment.get(contract.ENV_PRETEND_ACCELERATOR) == "1"
    memory = environment.get(contract.ENV_MEMORY_LIMIT_BYTES)
    cpus = environment.get(contract.ENV_CPU_LIMIT)
    try:
        return EngineConfig(
            model_uri=args.model_uri,
            dtype=args.dtype,
            weights=args.weights,
            weights_exclude=tuple(args.weights_exclude),
            kv_cache=args.kv_cache,
            device="cpu" if pretended else args.device,
            threads=args.threads or max(1, int(float(cpus or 1))),
            tensor_parallel=args.tensor_parallel,
            max_batch_tokens=args.max_batch_tokens,
            max_running=args.max_running,
            max_context_tokens=args.max_context_tokens,
            kv_cache_bytes=args.kv_cache_bytes,
            kv_cache_tokens=args.kv_cache_tokens,
            pace=args.pace,
            swap_bytes=args.swap_bytes,
            memory_tier_bytes=args.memory_tier_size,
            memory_tier_tenants=TenantParts.parse(
                args.memory_tier_tenant, args.memory_tier_default_quota
            ),
            disk_tier_bytes=args.disk_tier_size,
            disk_tier_dir=args.disk_tier_dir,
            disk_tier_tenants=TenantParts.parse(
                args.disk_tier_tenant, args.disk_tier_default_quota
            ),
            remote_tier=_remote_tier(args, environment),
            peer_tier=args.peer_tier,
            kv_cache_percent=args.kv_cache_percent,
            memory_limit_bytes=int(memory) if memory else None,
        )
    except ValueError as error:
        raise BadConfig(str(error)) from error


def _remote_tier(args: argparse.Namespace, environment: Mapping[str, str]) -> RemoteStore | None:
    if args.remote_tier_uri is None:
        return None
    prefix = contract.ENV_REMOTE_TIER
    credentials = {
        name.removeprefix(prefix): value
        for name, value in environment.items()
        if name.startswith(prefix)
    }
    return RemoteStore(args.remote_tier_uri, args.remote_tier_ttl_seconds, credentials)
