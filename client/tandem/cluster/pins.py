"""The versions of the control plane: read from the Go module that pins them, and compared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MODULE: Final = Path(__file__).with_name("controlplane")
"""Our Go module: etcd and the three Kubernetes components in one binary."""

SERVERS: Final = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
COMPONENTS: Final = (*SERVERS, "kubectl")

_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """MAJOR.MINOR.PATCH."""

    major: int
    minor: int
    patch: int

    @classmethod
    def find(cls, text: str) -> Version | None:
        """The first version in `text`, such as the output of `etcd --version`."""
        match = _VERSION.search(text)
        return None if match is None else cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


@dataclass(frozen=True, slots=True)
class Pins:
    """What the Go module asks for."""

    kubernetes: Version
    etcd: Version

    @classmethod
    def read(cls, module: Path = MODULE) -> Pins:
        """From the requirements in go.mod."""
        text = (module / "go.mod").read_text()
        found = {}
        for name, path in (
            ("kubernetes", "k8s.io/kubernetes"),
            ("etcd", "go.etcd.io/etcd/server/v3"),
        ):
            match = re.search(rf"^\s*{re.escape(path)} (v\S+)$", text, re.MULTILINE)
            version = Version.find(match[1]) if match else None
            if version is None:
                raise ValueError(f"{module / 'go.mod'} requires no {path}")
            found[name] = version
        return cls(**found)

    def wanted(self, component: str) -> Version:
        """The pinned version of a component."""
        return self.etcd if component == "etcd" else self.kubernetes

    def accepts(self, component: str, version: Version) -> bool:
        """Servers must have the pinned minor version; kubectl may be one minor off."""
        wanted = self.wanted(component)
        skew = 1 if component == "kubectl" else 0
        return version.major == wanted.major and abs(version.minor - wanted.minor) <= skew

    def describe(self, component: str) -> str:
        """What is accepted, for a message."""
        wanted = self.wanted(component)
        if component == "kubectl":
            return f"{wanted.major}.{wanted.minor - 1} to {wanted.major}.{wanted.minor + 1}"
        return f"{wanted.major}.{wanted.minor}"
