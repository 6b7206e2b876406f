"""Whatever happens to nodes: brakes hold, people are right, all of ours is undone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from node_cluster import Cluster, steps
from tandem_operator.api.node_health import NodeHealthPolicySpec
from tandem_operator.plan.actions import PatchNode, WriteStatus
from tandem_operator.plan.nodes.brakes import allowed
from tandem_operator.plan.nodes.plan import plan_nodes

EVENTS = st.tuples(
    st.sampled_from(
        ["silence", "recover", "cordon", "uncordon", "leave", "pause", "resume", "wait"]
    ),
    st.integers(0, 9),
    st.integers(1, 200),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 10), st.lists(EVENTS, max_size=40), st.booleans())
def test_whatever_happens(size: int, events: list[tuple[str, int, int]], may_write: bool) -> None:
    spec = {"drain": {"evictAfterSeconds": 30, "deadlineSeconds": 700, "afterDeadline": "Delete"}}
    cluster = Cluster(size, spec=spec, may_write=may_write)
    people: set[str] = set()
    """Nodes that a person cordoned while we had not."""
    for what, which, seconds in events:
        name = f"n{which % size}"
        ours = cluster.nodes[name].cordoned_by_us
        match what:
            case "silence":
                cluster.silence(name)
            case "recover":
                cluster.recover(name)
            case "cordon" if not ours:
                cluster.cordon(name)
                people.add(name)
            case "uncordon":
                cluster.cordon(name, on=False)
                people.discard(name)
            case "leave":
                cluster.pods.pop(f"p{which % size}", None)
            case "pause" | "resume":
                cluster.annotations = {"tandem.dev/repair-paused": str(what == "pause").lower()}
            case _:
                pass
        before = cluster.in_repair
        acted = cluster.look(seconds)
        # 1. Never more than the brakes allow, and nothing new during a pause or an outage.
        new = cluster.in_repair - before
        carrying = {p.node for p in cluster.pods.values()} | cluster.in_repair
        if new:
            limit = allowed(NodeHealthPolicySpec().brakes, len(carrying))
            cordoned = {n for n in people if n in carrying}
            assert len(cluster.in_repair) <= limit + len(cordoned)
            silent = [n for n in cluster.nodes.values() if n.silent]
            assert len(silent) * 2 <= size
            assert len(silent) < size
            assert what != "pause"
        # 2. One kind of step a node; none on a node that is not in repair, but to undo ours.
        by_node: dict[str, set[type]] = {}
        for action in steps(acted):
            target = action.target
            on = target.name if isinstance(action, PatchNode) else f"n{target.name[1:]}"
            by_node.setdefault(on, set()).add(type(action))
        assert all(len(kinds) == 1 for kinds in by_node.values())
        # 3. A person's cordon stays, and without the right nothing is written.
        assert people <= cluster.cordoned
        assert may_write or not any(n.annotations for n in cluster.nodes.values())
        # 4. A restart changes nothing: the same snapshot gives the same plan, and a plan that was
        #    carried out leaves nothing to write but further steps.
        again = plan_nodes(cluster.snapshot)
        assert again == plan_nodes(cluster.snapshot)
        once = [a for a in cluster.look().actions if isinstance(a, WriteStatus)]
        twice = [a for a in cluster.look().actions if isinstance(a, WriteStatus)]
        assert not (once and twice)
    # 5. Once all is well, everything of ours is undone.
    cluster.annotations = {}
    cluster.recover(*cluster.nodes)
    for _ in range(4):
        cluster.look(200)
    assert cluster.status.nodes == ()
    assert cluster.cordoned == people
    assert not any(n.annotations for n in cluster.nodes.values())
