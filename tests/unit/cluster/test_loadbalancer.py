from __future__ import annotations

from typing import Any

from tandem.cluster.loadbalancer import Balanced, Port, backends, balanced, external_url

SERVICE: dict[str, Any] = {
    "metadata": {"namespace": "ns", "name": "web", "uid": "u"},
    "spec": {
        "type": "LoadBalancer",
        "selector": {"app": "web"},
        "ports": [
            {"name": "grpc", "port": 8001, "targetPort": 8001, "nodePort": 30001},
            {"name": "http", "port": 80, "targetPort": "web", "nodePort": 30000},
            {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30002},
        ],
    },
}
HTTP = Port("http", 30000, "web")
WEB = Balanced("ns", "web", {"app": "web"}, (Port("grpc", 30001, 8001), HTTP))


def pod(ip: str, *, ready: bool = True, **metadata: Any) -> dict[str, Any]:
    ports = [{"name": "web", "containerPort": 8000}]
    return {
        "metadata": {"labels": {"app": "web"}, **metadata},
        "spec": {"containers": [{"name": "c", "ports": ports}]},
        "status": {
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def service(**spec: Any) -> dict[str, Any]:
    return {**SERVICE, "spec": {**SERVICE["spec"], **spec}}


def test_what_is_balanced() -> None:
    assert balanced(SERVICE) == WEB
    assert balanced(service(type="ClusterIP")) is None
    assert balanced(service(selector={})) is None
    going = {**SERVICE, "metadata": {**SERVICE["metadata"], "deletionTimestamp": "now"}}
    assert balanced(going) is None


def test_the_url_is_that_of_http() -> None:
    assert external_url(WEB) == "127.0.0.1:30000"
    assert external_url(Balanced("ns", "web", {}, (Port("", 30005, 1),))) == "127.0.0.1:30005"
    assert external_url(Balanced("ns", "web", {}, ())) is None


def test_backends_are_ready_and_stay() -> None:
    pods = [
        pod("127.65.1.3"),
        pod("127.65.1.2"),
        pod("127.65.1.4", ready=False),
        pod("127.65.1.5", deletionTimestamp="now"),
        pod("127.65.1.6", labels={"app": "other"}),
        {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": []}},
    ]
    assert backends(pods, WEB, HTTP) == [("127.65.1.2", 8000), ("127.65.1.3", 8000)]
    assert backends(pods[:1], WEB, WEB.ports[0]) == [("127.65.1.3", 8001)]
    assert backends(pods, WEB, Port("x", 1, "no-such-port")) == []
