"""The command line of the gateway."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem_runtime import contract
from tandem_runtime.frontend.process import read_secret


@dataclass(frozen=True)
class GatewayOptions:
    namespace: str
    kubeconfig: str | None
    host: str
    port: int
    grpc_port: int
    secret: bytes
    pod: str
    uid: str = ""
    """Of the pod; whoever knows it may tell the gateway what can be woken."""
    resume: bool = True
    """Whether a stream that has begun goes on elsewhere when its pods fail."""
    migrate: bool = True
    """Whether running streams leave a pod that drains."""


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> GatewayOptions:
    """Raises `BadConfig`."""
    cli = argparse.ArgumentParser(
        prog="python -m tandem_runtime.gateway",
        description="Serve the fleets of one namespace to clients.",
    )
    cli.add_argument("--namespace", default=environment.get(contract.ENV_NAMESPACE, "default"))
    cli.add_argument("--kubeconfig", help="default: the pod's ServiceAccount")
    cli.add_argument("--host", help=f"default: ${contract.ENV_POD_IP}, else 127.0.0.1")
    cli.add_argument("--port", type=int, default=contract.HTTP_PORT)
    cli.add_argument("--grpc-port", type=int, default=contract.GRPC_PORT)
    cli.add_argument(
        "--handoff-secret-file",
        type=Path,
        default=Path(contract.HANDOFF_SECRET_DIR) / contract.HANDOFF_SECRET_KEY,
    )
    cli.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on elsewhere with a stream that has begun when its pods fail",
    )
    cli.add_argument(
        "--migrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="move running streams off a pod that drains",
    )
    args = cli.parse_args(arguments)
    return GatewayOptions(
        namespace=args.namespace,
        kubeconfig=args.kubeconfig,
        host=args.host or environment.get(contract.ENV_POD_IP) or "127.0.0.1",
        port=args.port,
        grpc_port=args.grpc_port,
        secret=read_secret(args.handoff_secret_file, required=True),
        pod=environment.get(contract.ENV_POD_NAME, "local"),
        uid=environment.get(contract.ENV_POD_UID, ""),
        resume=args.resume,
        migrate=args.migrate,
    )
