"""What a fleet's cache tiers below the accelerator ask of its pods: flags, volume, memory."""

from __future__ import annotations

from tandem_runtime.contract import DISK_TIER_DIR, ENV_REMOTE_TIER

from tandem_operator.api.fleet import CacheTier, FleetSpec, tier_of
from tandem_operator.plan.actions import Manifest

_VOLUME = "kv-cache"


def tier_arguments(spec: FleetSpec) -> list[str]:
    """Flags of the runtime; it reads quantities itself."""
    memory, disk = tier_of(spec, "Memory"), tier_of(spec, "Disk")
    found = []
    if memory and memory.size:
        found += ["--memory-tier-size", memory.size, *_tenant_arguments("memory", memory)]
    if disk and disk.size:
        found += ["--disk-tier-size", disk.size, "--disk-tier-dir", DISK_TIER_DIR]
        found += _tenant_arguments("disk", disk)
    remote = tier_of(spec, "Remote")
    if remote and remote.uri:
        found += ["--remote-tier-uri", remote.uri]
        if remote.ttl_seconds is not None:
            found += ["--remote-tier-ttl-seconds", str(remote.ttl_seconds)]
    if tier_of(spec, "Peer"):
        found.append("--peer-tier")
    return found


def _tenant_arguments(name: str, tier: CacheTier) -> list[str]:
    found = []
    for tenant in tier.tenants or ():
        floor, quota = (
            "" if percent is None else str(percent)
            for percent in (tenant.floor_percent, tenant.quota_percent)
        )
        # Kubernetes expands $(NAME) in arguments, and writes $ for $$.
        part = f"{floor}..{quota}:{tenant.name.replace('$', '$$')}"
        found += [f"--{name}-tier-tenant", part]
    if tier.default_quota_percent is not None:
        found += [f"--{name}-tier-default-quota", str(tier.default_quota_percent)]
    return found


def tier_environment(spec: FleetSpec) -> list[Manifest]:
    """`envFrom` entries: the credentials of the Remote tier, under names of their own."""
    remote = tier_of(spec, "Remote")
    if remote is None or remote.secret_ref is None:
        return []
    return [{"prefix": ENV_REMOTE_TIER, "secretRef": {"name": remote.secret_ref.name}}]


def tier_volumes(spec: FleetSpec) -> list[Manifest]:
    """The volume that the fleet names for its Disk tier."""
    disk = tier_of(spec, "Disk")
    return [{"name": _VOLUME, **(disk.volume or {})}] if disk else []


def tier_mounts(spec: FleetSpec) -> list[Manifest]:
    disk = tier_of(spec, "Disk")
    return [{"name": _VOLUME, "mountPath": DISK_TIER_DIR}] if disk else []


def tier_requests(spec: FleetSpec) -> Manifest:
    """Memory that a pod asks for, unless a template says more."""
    memory = tier_of(spec, "Memory")
    return {"requests": {"memory": memory.size}} if memory else {}
