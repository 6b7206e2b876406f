"""The control plane as a program to build: etcd and the Kubernetes servers in one binary."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tandem.cluster.gobuild import Program
from tandem.cluster.pins import MODULE, SERVERS, Pins, Version

TAGS: Final = "notest,grpcnotrace"


def control_plane(module: Path = MODULE) -> Program:
    """Built from our Go module that pins the versions."""
    pins = Pins.read(module)
    return Program(
        name="controlplane",
        module=module,
        sources=("go.mod", "go.sum", "main.go"),
        package=".",
        tags=TAGS,
        linker_flags=linker_flags(pins.kubernetes),
        announcement=(
            "building etcd and Kubernetes from source, once for this machine: about 6 minutes on "
            "2 cores, 3 GB of memory, 4 GB of Go's caches"
        ),
        instead=(
            f"or set KUBEBUILDER_ASSETS to a folder with {', '.join(SERVERS)} of Kubernetes "
            f"{pins.describe('kube-apiserver')}"
        ),
        links=SERVERS,
    )


def linker_flags(version: Version) -> str:
    """Flags that make the binaries tell their version, as the official build does."""
    fields = {
        "gitVersion": f"v{version}",
        "gitMajor": str(version.major),
        "gitMinor": str(version.minor),
        "gitTreeState": "clean",
        "gitCommit": "unknown",
        "buildDate": "2026-01-01T00:00:00Z",
    }
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    sets = [f"-X {package}.{key}={value}" for package in packages for key, value in fields.items()]
    return " ".join(["-s", "-w", *sets])
