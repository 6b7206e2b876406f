"""Whether this machine can run containers, asked before anything is started."""

from __future__ import annotations

import asyncio
import os
import platform
import tempfile
from pathlib import Path

from tandem.agent import runtime
from tandem.agent.images import SYSTEM_PATH, image_paths
from tandem.agent.store import ContainerConfig, PodDir


class MachineError(RuntimeError):
    """This machine cannot run a local cluster; the message says what would help."""


def check_machine() -> None:
    """Runs one container to its end.

    Raises:
        MachineError: the kernel does not let us.
    """
    if platform.system() != "Linux":
        raise MachineError(
            "a local cluster needs Linux: its pods are processes in Linux namespaces. "
            "Use a Linux machine or virtual machine, or a real cluster."
        )
    with tempfile.TemporaryDirectory(prefix="tandem-preflight-") as folder:
        try:
            code = asyncio.run(_run_once(Path(folder)))
        except runtime.StartError as error:
            raise MachineError(
                f"this machine does not let us make containers: {error}. Run as root "
                "(in Docker: with --privileged), or allow unprivileged user namespaces "
                "(sysctl kernel.unprivileged_userns_clone=1, "
                "kernel.apparmor_restrict_unprivileged_userns=0)."
            ) from None
    if code != 0:
        raise MachineError(f"a test container ended with status {code} instead of 0")


async def _run_once(folder: Path) -> int:
    run = PodDir(folder / "pods" / "preflight").run("c", 0)
    config = ContainerConfig(
        argv=["true"],
        env={"PATH": SYSTEM_PATH},
        working_dir="/",
        hostname="preflight",
        log=str(run.log),
        mounts=[],
        private=["/tmp"],
        image_paths=image_paths(),
        devices=[],
        cgroups=[],
        read_only_root=False,
        rootless=os.geteuid() != 0,
        strikes=0,
        termination_log="",
    )
    started = await runtime.start(run, config)
    return (await runtime.wait(run, started)).code
