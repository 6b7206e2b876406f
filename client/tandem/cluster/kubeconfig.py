"""Kubeconfig files with their certificates inside, readable by their owner only."""

from __future__ import annotations

import base64
from pathlib import Path

import yaml

from tandem.cluster.pki import KeyPair


def write(path: Path, *, cluster: str, server: str, ca: Path, client: KeyPair) -> Path:
    """Writes a kubeconfig whose only context (and cluster, and user) is called `cluster`."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": cluster,
                "cluster": {"server": server, "certificate-authority-data": _encoded(ca)},
            }
        ],
        "users": [
            {
                "name": cluster,
                "user": {
                    "client-certificate-data": _encoded(client.certificate),
                    "client-key-data": _encoded(client.key),
                },
            }
        ],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": cluster}}],
        "current-context": cluster,
    }
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
