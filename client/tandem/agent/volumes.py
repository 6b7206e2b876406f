"""A pod's volumes: made before its containers start, kept true while they run.

Each becomes a folder (or file) of the machine that `mounts` binds into containers. ConfigMaps,
Secrets, tokens and downward-API files are written again whenever their contents change.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tandem.agent.api import Object
from tandem.agent.environment import expand
from tandem.agent.fields import FieldError, Host, field, resource
from tandem.agent.objects import ObjectReader
from tandem.agent.payload import DEFAULT_MODE, File, MissingKeyError, Payload, project, write
from tandem.agent.store import Mount, PodDir
from tandem.agent.tokens import TokenSource

DEFAULT_TOKEN_LIFE_S: Final = 3600
WRITTEN: Final = ("configMap", "secret", "projected", "downwardAPI")
SUPPORTED: Final = (*WRITTEN, "emptyDir", "hostPath", "persistentVolumeClaim")


class VolumeError(Exception):
    """A volume that cannot be made (yet); the message is for the pod's owner."""


@dataclass(frozen=True, slots=True)
class Volumes:
    """Makes the volumes of one pod."""

    objects: ObjectReader
    tokens: TokenSource
    folder: PodDir
    memory: Path
    """Where volumes of medium Memory live: a folder on a tmpfs, this pod's own."""
    pod_ip: str
    host: Host

    async def prepare(self, pod: Object) -> dict[str, Path]:
        """Makes every volume; returns their places by name.

        Raises:
            VolumeError: one cannot be made; the message names it.
        """
        return {
            volume["name"]: await self._prepare(pod, volume)
            for volume in pod["spec"].get("volumes") or []
        }

    async def refresh(self, pod: Object) -> None:
        """Writes again those volumes whose contents may have changed."""
        for volume in pod["spec"].get("volumes") or []:
            if any(kind in volume for kind in WRITTEN):
                await self._prepare(pod, volume)

    def remove(self) -> None:
        """Removes what does not lie in the pod's own folder."""
        shutil.rmtree(self.memory, ignore_errors=True)

    async def _prepare(self, pod: Object, volume: Object) -> Path:
        name = volume["name"]
        kind = next((kind for kind in volume if kind != "name"), "emptyDir")
        try:
            if kind in WRITTEN:
                payload = await self._payload(pod, kind, volume[kind])
                path = self.folder.volume(name)
                write(path, payload)
                return path
            if kind == "emptyDir":
                return self._empty_dir(name, volume.get(kind) or {})
            if kind == "hostPath":
                return _host_path(volume[kind])
            if kind == "persistentVolumeClaim":
                return await self._claim(pod, volume[kind]["claimName"])
        except (MissingKeyError, FieldError, VolumeError, OSError) as error:
            raise VolumeError(f'volume "{name}": {error}') from None
        raise VolumeError(
            f'volume "{name}": a local cluster has no {kind} volumes, use one of '
            + ", ".join(SUPPORTED)
        )

    def _empty_dir(self, name: str, source: Mapping[str, Any]) -> Path:
        medium = source.get("medium") or ""
        if medium not in ("", "Memory"):
            raise VolumeError(f"emptyDir medium {medium} does not exist here, use Memory or none")
        path = self.memory / name if medium else self.folder.volume(name)
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o777)
        return path

    async def _claim(self, pod: Object, claim: str) -> Path:
        path = await self.objects.claim_path(pod["metadata"]["namespace"], claim)
        if path is None:
            raise VolumeError(
                f"claim {claim} is not bound to a PersistentVolume with hostPath or local: "
                "only those can be mounted by a local cluster"
            )
        return Path(path)

    async def _payload(self, pod: Object, kind: str, source: Mapping[str, Any]) -> Payload:
        mode = source.get("defaultMode") or DEFAULT_MODE
        if kind == "projected":
            files: Payload = {}
            for part in source.get("sources") or []:
                inner = next(iter(part))
                files.update(await self._projected(pod, inner, part[inner], mode))
            return files
        return await self._projected(pod, kind, source, mode)

    async def _projected(
        self, pod: Object, kind: str, source: Mapping[str, Any], mode: int
    ) -> Payload:
        if kind in ("configMap", "secret"):
            return await self._object(pod, kind, source, mode)
        if kind == "serviceAccountToken":
            life_s = source.get("expirationSeconds") or DEFAULT_TOKEN_LIFE_S
            text = await self.tokens.token(source.get("audience") or "", life_s)
            # A token is for its pod alone, whatever the volume's default mode.
            return {source["path"]: File(text.encode(), 0o600)}
        if kind == "downwardAPI":
            return {
                item["path"]: File(self._downward(pod, item).encode(), item.get("mode") or mode)
                for item in source.get("items") or []
            }
        raise VolumeError(f"a local cluster cannot project {kind}")

    async def _object(
        self, pod: Object, kind: str, source: Mapping[str, Any], mode: int
    ) -> Payload:
        # A Secret volume says secretName where a projected source says name.
        name = source.get("name") or source.get("secretName") or ""
        namespace = pod["metadata"]["namespace"]
        optional = bool(source.get("optional"))
        read = self.objects.config_map if kind == "configMap" else self.objects.secret
        data = await read(namespace, name)
        what = f'{kind.lower()} "{name}"'
        if data is None:
            if optional:
                return {}
            raise VolumeError(f"{what} not found")
        return project(data, source.get("items"), mode, optional=optional, what=what)

    def _downward(self, pod: Object, item: Mapping[str, Any]) -> str:
        if reference := item.get("fieldRef"):
            return field(pod, self.pod_ip, self.host, reference["fieldPath"])
        reference = item["resourceFieldRef"]
        containers = {c["name"]: c for c in pod["spec"]["containers"]}
        return resource(containers[reference["containerName"]], self.host, reference)


def mounts(
    container: Mapping[str, Any], places: Mapping[str, Path], env: Mapping[str, str]
) -> list[Mount]:
    """A container's mounts, outer paths before those inside them.

    Raises:
        VolumeError: a subPath leaves its volume.
    """
    found = []
    for mount in container.get("volumeMounts") or []:
        source = places[mount["name"]]
        sub_path = mount.get("subPath") or expand(mount.get("subPathExpr") or "", env)
        if sub_path:
            source = _sub_path(source, sub_path)
        found.append(Mount(str(source), mount["mountPath"], bool(mount.get("readOnly"))))
    return sorted(found, key=lambda mount: mount.target.count("/"))


def _sub_path(volume: Path, sub_path: str) -> Path:
    path = volume / sub_path
    if not path.resolve().is_relative_to(volume.resolve()):
        raise VolumeError(f"subPath {sub_path!r} leaves its volume")
    if not path.exists():
        path.mkdir(parents=True)
        path.chmod(0o777)
    # Through ..data the link would be followed at the container's start only: bind the file.
    return path.resolve()


def _host_path(source: Mapping[str, Any]) -> Path:
    path, kind = Path(source["path"]), source.get("type") or ""
    if kind == "DirectoryOrCreate":
        path.mkdir(parents=True, exist_ok=True)
    elif kind == "FileOrCreate":
        path.touch(exist_ok=True)
    elif kind in ("", "Directory", "File") and not path.exists():
        raise VolumeError(f"hostPath {path} does not exist on this machine")
    if kind == "Directory" and not path.is_dir():
        raise VolumeError(f"hostPath {path} is not a directory")
    if kind == "File" and not path.is_file():
        raise VolumeError(f"hostPath {path} is not a file")
    return path
