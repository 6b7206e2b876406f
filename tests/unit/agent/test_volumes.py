from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tandem.agent.fields import Host
from tandem.agent.store import Mount, PodDir
from tandem.agent.volumes import VolumeError, Volumes, mounts


class FakeObjects:
    """ConfigMaps and Secrets by name."""

    def __init__(self) -> None:
        self.config_maps: dict[str, dict[str, bytes]] = {"cm": {"key": b"value"}}
        self.secrets: dict[str, dict[str, bytes]] = {"s": {"pw": b"hush"}}
        self.claims: dict[str, str] = {}

    async def config_map(self, namespace: str, name: str) -> Mapping[str, bytes] | None:
        return self.config_maps.get(name)

    async def secret(self, namespace: str, name: str) -> Mapping[str, bytes] | None:
        return self.secrets.get(name)

    async def claim_path(self, namespace: str, name: str) -> str | None:
        return self.claims.get(name)


class FakeTokens:
    def __init__(self) -> None:
        self.text = "token-1"

    async def token(self, audience: str, life_s: int) -> str:
        return f"{self.text}/{audience}/{life_s}"


@pytest.fixture
def objects() -> FakeObjects:
    return FakeObjects()


@pytest.fixture
def tokens() -> FakeTokens:
    return FakeTokens()


@pytest.fixture
def volumes(tmp_path: Path, objects: Any, tokens: Any) -> Volumes:
    folder = PodDir(tmp_path / "pods" / "u")
    host = Host("node-1", "127.65.1.1", 2, 2**33)
    return Volumes(objects, tokens, folder, tmp_path / "memory" / "u", "127.65.1.2", host)


def pod(*volumes: dict[str, Any]) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"a": "1"}},
        "spec": {"volumes": list(volumes), "containers": [{"name": "c"}]},
    }


async def test_config_maps_secrets_and_modes(volumes: Volumes) -> None:
    places = await volumes.prepare(
        pod(
            {"name": "a", "configMap": {"name": "cm", "defaultMode": 0o640}},
            {"name": "b", "secret": {"secretName": "s", "items": [{"key": "pw", "path": "x/y"}]}},
        )
    )
    assert (places["a"] / "key").read_bytes() == b"value"
    assert (places["a"] / "key").stat().st_mode & 0o777 == 0o640
    assert (places["b"] / "x" / "y").read_bytes() == b"hush"


async def test_a_projected_volume(volumes: Volumes) -> None:
    sources = [
        {"serviceAccountToken": {"path": "token", "audience": "v", "expirationSeconds": 600}},
        {"configMap": {"name": "cm", "items": [{"key": "key", "path": "ca.crt"}]}},
        {
            "downwardAPI": {
                "items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]
            }
        },
    ]
    places = await volumes.prepare(pod({"name": "p", "projected": {"sources": sources}}))
    assert (places["p"] / "token").read_text() == "token-1/v/600"
    assert (places["p"] / "token").stat().st_mode & 0o777 == 0o600
    assert (places["p"] / "ca.crt").read_bytes() == b"value"
    assert (places["p"] / "labels").read_text() == 'a="1"'


async def test_contents_follow_their_sources(
    volumes: Volumes, objects: FakeObjects, tokens: FakeTokens
) -> None:
    token = {"serviceAccountToken": {"path": "token"}}
    of = pod(
        {"name": "a", "configMap": {"name": "cm"}},
        {"name": "t", "projected": {"sources": [token]}},
        {"name": "e", "emptyDir": {}},
    )
    places = await volumes.prepare(of)
    (places["e"] / "kept").write_text("x")
    objects.config_maps["cm"] = {"other": b"new"}
    tokens.text = "token-2"
    await volumes.refresh(of)
    assert not (places["a"] / "key").exists()
    assert (places["a"] / "other").read_bytes() == b"new"
    assert (places["t"] / "token").read_text() == "token-2//3600"
    assert (places["e"] / "kept").exists()


async def test_empty_dirs_and_memory(volumes: Volumes, tmp_path: Path) -> None:
    places = await volumes.prepare(
        pod({"name": "a", "emptyDir": {}}, {"name": "m", "emptyDir": {"medium": "Memory"}})
    )
    assert places["m"].is_relative_to(tmp_path / "memory")
    assert places["a"].stat().st_mode & 0o777 == 0o777
    volumes.remove()
    assert not places["m"].exists()


async def test_claims_that_are_folders_of_the_machine(
    volumes: Volumes, objects: FakeObjects, tmp_path: Path
) -> None:
    objects.claims["data"] = str(tmp_path)
    claim = {"name": "d", "persistentVolumeClaim": {"claimName": "data"}}
    assert await volumes.prepare(pod(claim)) == {"d": tmp_path}


@pytest.mark.parametrize(
    ("volume", "sentence"),
    [
        ({"configMap": {"name": "no"}}, 'volume "v": configmap "no" not found'),
        ({"secret": {"secretName": "no"}}, 'volume "v": secret "no" not found'),
        (
            {"configMap": {"name": "cm", "items": [{"key": "z", "path": "z"}]}},
            'configmap "cm" references non-existent key: z',
        ),
        ({"emptyDir": {"medium": "HugePages"}}, "emptyDir medium HugePages does not exist here"),
        ({"hostPath": {"path": "/no/such"}}, "hostPath /no/such does not exist"),
        ({"hostPath": {"path": "/etc/hosts", "type": "Directory"}}, "is not a directory"),
        ({"hostPath": {"path": "/etc", "type": "File"}}, "is not a file"),
        ({"persistentVolumeClaim": {"claimName": "c"}}, "claim c is not bound to a"),
        ({"nfs": {"server": "x"}}, "a local cluster has no nfs volumes, use one of configMap"),
        ({"projected": {"sources": [{"clusterTrustBundle": {}}]}}, "cannot project"),
    ],
)
async def test_what_cannot_be_made_says_why(
    volumes: Volumes, volume: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(VolumeError) as failure:
        await volumes.prepare(pod({"name": "v", **volume}))
    assert sentence in str(failure.value)


async def test_optional_objects_may_be_missing(volumes: Volumes) -> None:
    missing = {"name": "v", "secret": {"secretName": "no", "optional": True}}
    places = await volumes.prepare(pod(missing))
    assert [path.name for path in places["v"].iterdir() if path.name[0] != "."] == []


def test_mounts_come_outer_first(tmp_path: Path) -> None:
    places = {"a": tmp_path / "a", "b": tmp_path / "b"}
    (tmp_path / "b" / "sub").mkdir(parents=True)
    container = {
        "volumeMounts": [
            {"name": "b", "mountPath": "/data/inner", "subPath": "sub", "readOnly": True},
            {"name": "a", "mountPath": "/data"},
        ]
    }
    assert mounts(container, places, {}) == [
        Mount(str(tmp_path / "a"), "/data"),
        Mount(str(tmp_path / "b" / "sub"), "/data/inner", read_only=True),
    ]


def test_sub_paths(tmp_path: Path) -> None:
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "key").write_text("x")
    (tmp_path / "key").symlink_to("..data/key")
    places = {"v": tmp_path}

    def source(**mount: str) -> str:
        entry = {"name": "v", "mountPath": "/m", **mount}
        return mounts({"volumeMounts": [entry]}, places, {"POD": "p-1"})[0].source

    assert source(subPath="key") == str(tmp_path / "..data" / "key")
    assert source(subPathExpr="logs/$(POD)") == str(tmp_path / "logs" / "p-1")
    assert (tmp_path / "logs" / "p-1").is_dir()
    with pytest.raises(VolumeError, match="leaves its volume"):
        source(subPath="../../etc")
