"""Nobody notices a rollout, a scale-in, a halted rollout, a lost pod, an undo, or an API outage."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from fleets import eventually, is_ready
from load import OUTPUT_TOKENS, Load, capacity
from served import START_S, Served, real_pool
from tandem.cluster.process import send_signal
from tandem.cluster.running import Running

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def chat(serve: Callable[..., Served]) -> Served:
    return serve("chat", prefill=1, decode=2)


@pytest.fixture
def rate(chat: Served) -> float:
    """4 requests a second, or 40 % of what the machine can do if that is less."""
    return min(4.0, 0.4 * asyncio.run(capacity(chat.url, chat.model)))


def revision(pod: str) -> str:
    return pod.rsplit("-", 2)[1]


def assert_unnoticed(load: Load) -> None:
    """Every request complete, and never a pair of two revisions."""
    assert not load.failures, load.failures
    assert Counter(o.tokens for o in load.outcomes).keys() == {OUTPUT_TOKENS}
    for outcome in load.outcomes:
        prefill, decode = outcome.pair
        assert not prefill or revision(prefill) == revision(decode), outcome


def edit_pools(chat: Served, **environment: str) -> None:
    """What `kubectl edit` of both templates does."""
    change = {role: {"template": real_pool(1, **environment)["template"]} for role in POOLS}
    chat.fleets.edit(f"inferencefleet/{chat.name}", {"spec": change})


POOLS = ("prefill", "decode")


def test_a_rollout_and_a_scale_in(chat: Served, rate: float) -> None:
    (before,) = chat.fleets.revisions()
    with Load(chat.url, chat.model, rate) as load:
        time.sleep(2)
        edit_pools(chat, VERSION="2")
        chat.wait_ready()
        (after,) = chat.fleets.revisions()
        assert after != before
        chat.fleets.edit(f"inferencefleet/{chat.name}", {"spec": {"decode": {"replicas": 1}}})
        eventually(lambda: len(chat.fleets.pods("chat-decode", terminating=True)) == 1)
        time.sleep(2)
    assert_unnoticed(load)
    served = Counter(revision(outcome.pair[1]) for outcome in load.outcomes)
    assert served.keys() == {before, after}, served
    split = sum(1 for outcome in load.outcomes if outcome.pair[0])
    assert split > len(load.outcomes) / 2, "most requests went through a prefill pod"


def test_a_halted_rollout_a_lost_pod_and_an_undo(chat: Served, rate: float) -> None:
    (good,) = chat.fleets.revisions()
    with Load(chat.url, chat.model, rate) as load:
        bad = real_pool(1)["template"]
        bad["spec"]["containers"][0]["image"] = "registry.example/not-there:1"
        change = {role: {"template": bad} for role in POOLS}
        chat.fleets.edit("inferencefleet/chat", {"spec": change})
        said = chat.fleets.wait_condition("Stalled", "True", "RolloutHalted", timeout_s=START_S)
        assert "registry.example/not-there:1" in said.sentence
        # Without a warning: its processes are killed, its streams go on elsewhere.
        lost = sorted(chat.fleets.ready("chat-decode"))[0]
        chat.fleets.kubectl("delete", "pod", lost, "--grace-period=0", "--force")
        eventually(lambda: len(chat.fleets.ready("chat-decode")) == 2, timeout_s=START_S)
        serving = [p for p in chat.fleets.pods() if is_ready(p)]
        assert {p["metadata"]["labels"]["tandem.dev/revision"] for p in serving} == {good}
        chat.fleets.tandem("rollout", "undo", "fleet/chat")
        chat.wait_ready()
        assert chat.fleets.revisions() == {good}
        assert chat.fleets.condition("RolledBack").status == "True"
        time.sleep(2)
    assert_unnoticed(load)


def test_the_api_server_is_away(chat: Served, rate: float, cluster: Running) -> None:
    api_server = cluster.process("kube-apiserver")
    with Load(chat.url, chat.model, rate) as load:
        time.sleep(2)
        send_signal(api_server, signal.SIGSTOP)
        try:
            time.sleep(20)
        finally:
            send_signal(api_server, signal.SIGCONT)
        time.sleep(2)
    assert_unnoticed(load)
    eventually(lambda: all(is_ready(pod) for pod in chat.fleets.pods()))


def test_users_scale_delete_and_remove(serve: Callable[..., Any]) -> None:
    """`kubectl scale pool`, `kubectl delete pod` and `kubectl delete inferencefleet`."""
    free = serve("free", prefill=None, decode=None)
    fleets = free.fleets
    fleets.kubectl("scale", "pool", "free-decode", "--replicas=2")
    eventually(lambda: len(fleets.ready("free-decode")) == 2, timeout_s=START_S)
    victim = fleets.pods("free-decode")[0]["metadata"]
    fleets.kubectl("delete", "pod", victim["name"])
    eventually(lambda: len(fleets.ready("free-decode")) == 2, timeout_s=START_S)
    # Its name is free for another one.
    assert victim["uid"] not in {pod["metadata"]["uid"] for pod in fleets.pods()}
    fleets.kubectl("delete", "inferencefleet", "free")
    kinds = "pods,pools,pdb,controllerrevisions,deployments,services,rolebindings"

    def left() -> set[str]:
        names = {f"{o['kind']}/{o['metadata']['name']}" for o in fleets.get(kinds)["items"]}
        return {name for name in names if "kube-root-ca" not in name}

    eventually(lambda: not left(), timeout_s=90)
