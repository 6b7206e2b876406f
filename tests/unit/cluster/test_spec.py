from __future__ import annotations

import ipaddress

import pytest
from tandem.cluster.spec import (
    MAX_NODES,
    SLOTS,
    Cluster,
    ClusterSpec,
    Network,
    NodeTimings,
    SpecError,
)


def test_the_defaults_are_those_of_kubernetes() -> None:
    timings = NodeTimings()
    assert (timings.grace_s, timings.toleration_s, timings.monitor_period_s) == (50, 300, 5)
    assert (timings.lease_duration_s, timings.lease_renew_s) == (40, 10)


@pytest.mark.parametrize("grace_s", [2.0, 4.0, 20.0, 50.0, 100.0])
def test_a_node_renews_well_within_its_grace(grace_s: float) -> None:
    timings = NodeTimings(grace_s=grace_s)
    assert timings.lease_duration_s < grace_s
    assert timings.lease_renew_s <= grace_s / 4
    assert timings.monitor_period_s <= grace_s / 8


def test_no_two_clusters_share_an_address_or_a_port() -> None:
    networks = [Network(slot) for slot in SLOTS]
    assert len({network.host for network in networks}) == len(networks)
    ports = [set(range(first, last + 1)) for first, last in (n.node_ports for n in networks)]
    assert len(set.union(*ports)) == sum(len(one) for one in ports)
    assert all(30000 <= port <= 32767 for port in set.union(*ports))
    for network in networks:
        addresses = [network.host, network.node_ip(1), network.node_ip(MAX_NODES)]
        assert all(ipaddress.ip_address(address).is_loopback for address in addresses)


def test_a_nodes_pods_are_beside_it() -> None:
    network = Network(3)
    assert network.api_url == "https://127.67.0.1:6443"
    pods = ipaddress.ip_network(network.pod_network(2))
    assert ipaddress.ip_address(network.node_ip(2)) in pods
    assert not pods.overlaps(ipaddress.ip_network(network.pod_network(3)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "Upper"}, "use lower-case letters"),
        ({"name": ""}, "use lower-case letters"),
        ({"name": "a" * 31}, "at most 30 characters"),
        ({"name": "../x"}, "use lower-case letters"),
        ({"nodes": 0}, "--nodes 0: use 1 to 200"),
        ({"nodes": 201}, "--nodes 201: use 1 to 200"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1: use 0 to 64"),
        ({"timings": NodeTimings(grace_s=1)}, "node grace 1 s: use 2 s or more"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(
    changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(SpecError, match=sentence):
        ClusterSpec(**changes)  # type: ignore[arg-type]


def test_round_trip() -> None:
    cluster = Cluster(ClusterSpec(nodes=2, timings=NodeTimings(grace_s=4)), Network(5))
    assert Cluster.from_json(cluster.to_json()) == cluster
