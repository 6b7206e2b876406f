"""From a pod's container to what its shim runs: environment, mounts, devices, limits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from tandem_runtime import contract

from tandem.agent import environment
from tandem.agent.api import ApiError, Object
from tandem.agent.config import Gpu
from tandem.agent.fields import FieldError, field, resource
from tandem.agent.images import Image
from tandem.agent.podspec import containers
from tandem.agent.quantity import milli
from tandem.agent.services import Services
from tandem.agent.store import ContainerConfig, Mount, RunDir
from tandem.agent.volumes import VolumeError, mounts

TERMINATION_LOG: Final = contract.TERMINATION_LOG
GPU_CONTROL_DEVICES: Final = (
    "nvidiactl",
    "nvidia-uvm",
    "nvidia-uvm-tools",
    "nvidia-modeset",
    "nvidia-caps",
)
PRIVATE: Final = ("/tmp", "/run/secrets")


class ConfigError(Exception):
    """The container cannot be configured yet: something that it refers to is missing."""


@dataclass(frozen=True, slots=True)
class PodPlace:
    """What a pod was given on this node."""

    ip: str
    gpus: Mapping[str, list[Gpu]]
    """By container; a container that asked for none is absent."""
    volumes: Mapping[str, Path]


async def configure(
    services: Services,
    pod: Object,
    place: PodPlace,
    spec: Mapping[str, Any],
    image: Image,
    run: RunDir,
    strikes: int,
) -> ContainerConfig:
    """What the shim is to run for one run of one container.

    Raises:
        ConfigError: with the sentence for the container's status.
    """
    try:
        env = await _environment(services, pod, place, spec, image)
        volume_mounts = mounts(spec, place.volumes, env)
    except (environment.MissingSourceError, FieldError, VolumeError) as error:
        raise ConfigError(str(error)) from None
    except (ApiError, aiohttp.ClientError, TimeoutError) as error:
        raise ConfigError(f"the API server did not answer: {error}") from None
    argv = environment.argv(spec, image.entrypoint, env)
    if not argv:
        raise ConfigError(f"image {image.name} has no entry point: give the container a command")
    termination_log = _touched(run.path / "termination-log")
    gpus = place.gpus.get(spec["name"], [])
    hostname = pod["spec"].get("hostname") or pod["metadata"]["name"]
    return ContainerConfig(
        argv=argv,
        env=env,
        working_dir=spec.get("workingDir") or "/",
        hostname=hostname[:63],
        log=str(run.log),
        mounts=[
            *image.caches,
            _hosts_file(services, pod, place.ip, hostname),
            *volume_mounts,
            Mount(str(termination_log), spec.get("terminationMessagePath") or TERMINATION_LOG),
        ],
        private=[*PRIVATE, services.config.state_home],
        image_paths=image.paths,
        devices=_devices(gpus),
        cgroups=_cgroups(services, pod, spec),
        read_only_root=bool(
            (spec.get("securityContext") or {}).get("readOnlyRootFilesystem", False)
        ),
        rootless=os.geteuid() != 0,
        strikes=strikes,
        termination_log=str(termination_log),
    )


def _touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def _hosts_file(services: Services, pod: Object, ip: str, hostname: str) -> Mount:
    """The pod's /etc/hosts, in which it finds itself."""
    path = services.store.pod(pod["metadata"]["uid"]).path / "etc-hosts"
    path.write_text(f"127.0.0.1 localhost\n{ip} {hostname}\n")
    return Mount(str(path), "/etc/hosts")


async def _environment(
    services: Services, pod: Object, place: PodPlace, spec: Mapping[str, Any], image: Image
) -> dict[str, str]:
    namespace = pod["metadata"]["namespace"]
    wanted = environment.references(spec)
    config_maps = {n: await services.objects.config_map(namespace, n) for n in wanted.config_maps}
    secrets = {n: await services.objects.secret(namespace, n) for n in wanted.secrets}
    siblings = {container["name"]: container for _, _, container in containers(pod)}

    def container_resource(reference: Mapping[str, Any]) -> str:
        owner = siblings.get(reference.get("containerName") or spec["name"], spec)
        return resource(owner, services.host, reference)

    sources = environment.Sources(
        {name: _text(data) for name, data in config_maps.items()},
        {name: _text(data) for name, data in secrets.items()},
        lambda path: field(pod, place.ip, services.host, path),
        container_resource,
    )
    given = {
        **image.env,
        **_service_env(services),
        **_gpu_env(place.gpus.get(spec["name"], [])),
        "HOSTNAME": pod["spec"].get("hostname") or pod["metadata"]["name"],
    }
    return environment.build(spec, given, sources)


def _text(data: Mapping[str, bytes] | None) -> dict[str, str] | None:
    if data is None:
        return None
    return {key: value.decode(errors="replace") for key, value in data.items()}


def _service_env(services: Services) -> dict[str, str]:
    """Where the API server is, in the variables that every client library reads."""
    host, port = services.config.api_host, str(services.config.api_port)
    return {
        "KUBERNETES_SERVICE_HOST": host,
        "KUBERNETES_SERVICE_PORT": port,
        "KUBERNETES_SERVICE_PORT_HTTPS": port,
        "KUBERNETES_PORT": f"tcp://{host}:{port}",
    }


def _gpu_env(gpus: list[Gpu]) -> dict[str, str]:
    if not gpus:
        return {"NVIDIA_VISIBLE_DEVICES": "void"}
    env = {"NVIDIA_VISIBLE_DEVICES": ",".join(str(gpu.index) for gpu in gpus)}
    if any(gpu.minor is None for gpu in gpus):
        env[contract.ENV_PRETEND_ACCELERATOR] = "1"
    return env


def _devices(gpus: list[Gpu]) -> list[str]:
    real = [f"nvidia{gpu.minor}" for gpu in gpus if gpu.minor is not None]
    return [*real, *GPU_CONTROL_DEVICES] if real else []


def _cgroups(services: Services, pod: Object, spec: Mapping[str, Any]) -> list[str]:
    limit = ((spec.get("resources") or {}).get("limits") or {}).get("cpu")
    if limit is None or services.cgroups is None:
        return []
    path = services.cgroups.limit(pod["metadata"]["uid"], spec["name"], milli(limit))
    return [path] if path else []
