from __future__ import annotations

from pathlib import Path

import pytest
from tandem_runtime import contract
from tandem_runtime.contract import Role
from tandem_runtime.frontend.process import BadConfig
from tandem_runtime.kv.tiers.tenants import TenantPart, TenantParts
from tandem_runtime.serve.options import parse

MODEL = ["--model-name", "m", "--model-uri", "file:///m.gguf"]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(b"0123456789abcdef0123456789abcdef\n")
    return path


def test_defaults(tmp_path: Path) -> None:
    options = parse(["--role", "both", *MODEL, "--handoff-secret-file", str(tmp_path / "none")], {})
    assert (options.role, options.served_names) == (Role.BOTH, ("m",))
    assert (options.host, options.port) == ("127.0.0.1", contract.HTTP_PORT)
    assert options.secret == b""
    assert (options.engine.device, options.engine.threads) == ("cpu", 1)


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 128), ("cuda", 2048)])
def test_the_budget_of_a_step_follows_the_device(device: str, tokens: int, secret: Path) -> None:
    arguments = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret)]
    assert parse([*arguments, "--device", device], {}).engine.batch_tokens == tokens
    given = [*arguments, "--device", device, "--max-batch-tokens", "512"]
    assert parse(given, {}).engine.batch_tokens == 512


def test_weights_and_kv_are_quantised_where_asked(secret: Path) -> None:
    arguments = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret)]
    assert parse(arguments, {}).engine.weights == "none"
    assert parse([*arguments, "--weights", "int4"], {}).engine.weights == "int4"
    kept = [f"--weights-exclude={kind}" for kind in ("attention", "last-layer")]
    engine = parse([*arguments, "--weights", "int4", *kept], {}).engine
    assert engine.weights_exclude == ("attention", "last-layer")
    assert parse(arguments, {}).engine.kv_dtype == "bfloat16"
    assert parse([*arguments, "--kv-cache", "fp8"], {}).engine.kv_dtype == "fp8"


@pytest.mark.parametrize(("device", "default"), [("cpu", 0), ("cuda", 4 << 30)])
def test_host_memory_for_swapping_follows_the_device(
    device: str, default: int, secret: Path
) -> None:
    arguments = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret)]
    arguments += ["--device", device]
    assert parse(arguments, {}).engine.swap_capacity_bytes == default
    assert parse([*arguments, "--swap-bytes", "77"], {}).engine.swap_capacity_bytes == 77
    with pytest.raises(BadConfig, match="swap_bytes is -1"):
        parse([*arguments, "--swap-bytes", "-1"], {})


def test_the_pods_environment(secret: Path) -> None:
    arguments = ["--role", "decode", *MODEL, "--device", "cuda"]
    arguments += ["--handoff-secret-file", str(secret), "--served-name", "a", "--served-name", "b"]
    options = parse(
        arguments,
        {
            contract.ENV_POD_IP: "127.9.8.7",
            contract.ENV_POD_NAME: "pod-1",
            contract.ENV_POD_UID: "8a7d",
            contract.ENV_REVISION: "r7",
            contract.ENV_FLEET: "chat",
            contract.ENV_MEMORY_LIMIT_BYTES: "2000000000",
            contract.ENV_CPU_LIMIT: "3",
            contract.ENV_PRETEND_ACCELERATOR: "1",
        },
    )
    assert (options.host, options.pod, options.revision) == ("127.9.8.7", "pod-1", "r7")
    assert options.uid == "8a7d"
    assert (options.fleet, options.served_names) == ("chat", ("a", "b"))
    assert options.engine.memory_limit_bytes == 2_000_000_000
    assert options.engine.threads == 3
    assert options.engine.device == "cpu", "the accelerator is only pretended"
    assert options.secret == b"0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_split_roles_need_the_secret(role: str, tmp_path: Path) -> None:
    missing = ["--handoff-secret-file", str(tmp_path / "key")]
    with pytest.raises(BadConfig, match=r"the handoff secret .*/key is missing: .* Mount the Sec"):
        parse(["--role", role, *MODEL, *missing], {})


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_a_short_secret_is_none(role: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"short\n")
    with pytest.raises(BadConfig, match=r"has 5 bytes; it needs at least 16 random ones"):
        parse(["--role", role, *MODEL, "--handoff-secret-file", str(path)], {})


def test_a_folder_where_the_secret_should_be(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read"):
        parse(["--role", "decode", *MODEL, "--handoff-secret-file", str(tmp_path)], {})


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max-batch-tokens", "0"], "max_batch_tokens is 0"),
        (["--kv-cache-percent", "150"], "kv_cache_percent is 150"),
        (["--max-running", "999"], "max_running is 999, but a step has only 128"),
    ],
)
def test_sizes_that_make_no_engine(flags: list[str], sentence: str, secret: Path) -> None:
    arguments = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret), *flags]
    with pytest.raises(BadConfig, match=sentence):
        parse(arguments, {})


def test_cache_tiers_below_the_accelerator(secret: Path) -> None:
    arguments = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret)]
    flags = ["--memory-tier-size", "1.5Gi", "--disk-tier-size", "6k", "--disk-tier-dir", "/kv"]
    engine = parse([*arguments, *flags], {}).engine
    assert (engine.memory_tier_bytes, engine.disk_tier_bytes) == (3 << 29, 6000)
    assert engine.disk_tier_dir == "/kv"
    with pytest.raises(BadConfig, match="disk_tier_bytes and disk_tier_dir go together"):
        parse([*arguments, "--disk-tier-size", "6"], {})


def test_tenants_have_parts_of_tiers(secret: Path) -> None:
    arguments = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret)]
    parts = ["--memory-tier-tenant=25..50:search", "--memory-tier-tenant=..10:batch"]
    engine = parse([*arguments, "--memory-tier-size", "1Gi", *parts], {}).engine
    named = (TenantPart("search", 25, 50), TenantPart("batch", 0, 10))
    assert engine.memory_tier_tenants == TenantParts(named)
    assert engine.disk_tier_tenants == TenantParts()
    disk = ["--disk-tier-size=1Gi", "--disk-tier-dir=/kv", "--disk-tier-default-quota=5"]
    engine = parse([*arguments, *disk], {}).engine
    assert engine.disk_tier_tenants == TenantParts((), 5)
    with pytest.raises(BadConfig, match=r"parts of a memory tier, but there is none: give its"):
        parse([*arguments, *parts], {})
    with pytest.raises(BadConfig, match=r"parts of a disk tier, but there is none"):
        parse([*arguments, "--disk-tier-default-quota=5"], {})
    with pytest.raises(BadConfig, match="'search' is no tenant's part of a tier: write FLOOR"):
        parse([*arguments, "--memory-tier-size", "1Gi", "--memory-tier-tenant=search"], {})


@pytest.mark.parametrize("size", ["", "-1", "64 gigs", "1e3", "5m", "Gi"])
def test_a_size_that_is_none(size: str, secret: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret)]
    with pytest.raises(SystemExit):
        parse([*arguments, f"--memory-tier-size={size}"], {})
    assert "is no size; write for example 64Gi" in capsys.readouterr().err


def test_a_tier_of_peers_needs_the_secret(secret: Path, tmp_path: Path) -> None:
    arguments = ["--role", "both", *MODEL, "--handoff-secret-file"]
    assert not parse([*arguments, str(secret)], {}).engine.peer_tier
    assert parse([*arguments, str(secret), "--peer-tier"], {}).engine.peer_tier
    with pytest.raises(BadConfig, match="--peer-tier needs the handoff secret"):
        parse([*arguments, str(tmp_path / "none"), "--peer-tier"], {})


def test_a_remote_tier_and_its_credentials(secret: Path) -> None:
    arguments = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret)]
    assert parse(arguments, {}).engine.remote_tier is None
    arguments += ["--remote-tier-uri", "rediss://valkey.cache:6379", "--remote-tier-ttl-seconds"]
    environment = {f"{contract.ENV_REMOTE_TIER}PASSWORD": "sesame", "PASSWORD": "another"}
    tier = parse([*arguments, "60"], environment).engine.remote_tier
    assert tier is not None
    assert (tier.uri, tier.ttl_s) == ("rediss://valkey.cache:6379", 60)
    assert tier.credentials == {"PASSWORD": "sesame"}
    assert "sesame" not in repr(tier)
    with pytest.raises(BadConfig, match="ttl_s of the remote tier is 0"):
        parse([*arguments, "0"], {})


@pytest.mark.parametrize("uri", ["memcached://cache", "redis://:secret@cache", "cache:6379"])
def test_a_remote_tier_that_is_none(uri: str, secret: Path) -> None:
    arguments = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret)]
    with pytest.raises(BadConfig, match=r"names no store|into a Secret"):
        parse([*arguments, "--remote-tier-uri", uri], {})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pace", "h1000"], "h1000 is not in the catalogue: use one of A100, H100"),
        (
            ["--pace", "h100:gpt-5"],
            "no model of that name is known: give the path",
        ),
        (["--pace", "h100:llama-3.1-405b"], "no room for KV on 1 H100: state a smaller model"),
        (["--pace", "h100", "--device", "cuda"], "computes on the CPU; leave pace out"),
        (["--kv-cache-tokens", "0"], "kv_cache_tokens is 0: give at least 1"),
        (["--kv-cache-tokens", "9", "--kv-cache-bytes", "9"], "exclude each other"),
    ],
)
def test_a_pace_that_cannot_be_kept_is_refused(
    arguments: list[str], sentence: str, secret: Path
) -> None:
    always = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret)]
    with pytest.raises(BadConfig, match=sentence):
        parse([*always, *arguments], {})


def test_a_paced_pod_takes_the_stated_accelerators_steps(secret: Path) -> None:
    always = ["--role", "both", *MODEL, "--handoff-secret-file", str(secret)]
    assert parse(always, {}).engine.stated is None
    engine = parse([*always, "--pace", "h200", "--weights", "fp8"], {}).engine
    assert engine.stated_name == "H200:llama-3.1-8b"
    assert engine.stated is not None
    assert engine.stated.model.weights == "fp8"
    assert engine.batch_tokens == 2048
    # A pretended accelerator is none.
    pretended = {contract.ENV_PRETEND_ACCELERATOR: "1"}
    assert parse([*always, "--device", "cuda", "--pace", "h100"], pretended).engine.pace == "h100"
