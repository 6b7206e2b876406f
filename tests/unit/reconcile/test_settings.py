"""Settings from the environment."""

from __future__ import annotations

import pytest
from tandem_operator.settings import Settings, from_environment


def test_nothing_set_is_the_defaults() -> None:
    assert from_environment({"PATH": "/bin", "TANDEM_WORKERS": " "}) == Settings()


def test_every_type_is_read() -> None:
    settings = from_environment(
        {
            "TANDEM_POD_IP": "127.0.0.9",
            "TANDEM_WORKERS": "3",
            "TANDEM_RESYNC_S": "1.5",
            "TANDEM_WATCH_NAMESPACES": "a, b,",
            "TANDEM_DRAIN_TAINTS": "example.com/leaving",
        }
    )
    assert settings == Settings(
        pod_ip="127.0.0.9",
        workers=3,
        resync_s=1.5,
        watch_namespaces=("a", "b"),
        drain_taints=("example.com/leaving",),
    )


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"TANDEM_WORKERS": "many"}, "TANDEM_WORKERS is 'many'; write a number"),
        ({"TANDEM_GATEWAY_SERVICE_TYPE": "Ingress"}, "use one of ClusterIP, NodePort"),
        ({"TANDEM_GATEWAY_REPLICAS": "0"}, "TANDEM_GATEWAY_REPLICAS must be at least 1"),
        ({"TANDEM_LEASE_RENEW_S": "10"}, "must be at least twice"),
        ({"TANDEM_WORKERS": "0"}, "TANDEM_WORKERS must be at least 1"),
        ({"TANDEM_RESYNC_S": "0"}, "TANDEM_RESYNC_S must be at least 0.1 seconds"),
        ({"TANDEM_SCRAPE_INTERVAL_S": "nan"}, "TANDEM_SCRAPE_INTERVAL_S must be at least 0.1"),
        ({"TANDEM_GATEWAY_GRACE_S": "-1"}, "must not be negative"),
        ({"TANDEM_SCALING_INTERVAL_S": "0"}, "TANDEM_SCALING_INTERVAL_S must be at least 0.1"),
        ({"TANDEM_PROMETHEUS_URL": "prometheus:9090"}, "write http://HOST:PORT or https://HOST"),
    ],
)
def test_what_cannot_work_is_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_environment(environment)
