from __future__ import annotations

from typing import Any

import pytest
from tandem.agent.fields import FieldError, Host, field, resource

HOST = Host("node-1", "127.65.1.1", cpus=4, memory_bytes=8 * 2**30)
POD: dict[str, Any] = {
    "metadata": {
        "name": "p",
        "namespace": "ns",
        "uid": "u-1",
        "labels": {"b": "2", "a": "1"},
        "annotations": {"note": 'says "hi"\nthere'},
    },
    "spec": {"serviceAccountName": "sa", "containers": []},
}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("metadata.name", "p"),
        ("metadata.namespace", "ns"),
        ("metadata.uid", "u-1"),
        ("spec.nodeName", "node-1"),
        ("spec.serviceAccountName", "sa"),
        ("status.podIP", "127.65.1.2"),
        ("status.podIPs", "127.65.1.2"),
        ("status.hostIP", "127.65.1.1"),
        ("metadata.labels['a']", "1"),
        ("metadata.labels['absent']", ""),
        ("metadata.labels", 'a="1"\nb="2"'),
        ("metadata.annotations", 'note="says \\"hi\\"\\nthere"'),
    ],
)
def test_field(path: str, text: str) -> None:
    assert field(POD, "127.65.1.2", HOST, path) == text


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(FieldError, match=r"unsupported fieldPath: spec\.volumes"):
        field(POD, "", HOST, "spec.volumes")


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ({"resource": "limits.cpu"}, "2"),
        ({"resource": "limits.cpu", "divisor": "1m"}, "1500"),
        ({"resource": "limits.memory"}, str(2**30)),
        ({"resource": "limits.memory", "divisor": "1Mi"}, "1024"),
        ({"resource": "requests.memory"}, str(2**30)),
        ({"resource": "requests.cpu", "divisor": "1m"}, "250"),
        ({"resource": "limits.ephemeral-storage"}, "0"),
    ],
)
def test_resource(reference: dict[str, str], text: str) -> None:
    limits = {"cpu": "1500m", "memory": "1Gi"}
    container = {"resources": {"limits": limits, "requests": {"cpu": "250m"}}}
    assert resource(container, HOST, reference) == text


def test_a_limit_that_is_not_set_reads_as_the_node_has() -> None:
    assert resource({}, HOST, {"resource": "limits.cpu"}) == "4"
    assert resource({}, HOST, {"resource": "limits.memory"}) == str(8 * 2**30)
    assert resource({}, HOST, {"resource": "requests.cpu"}) == "0"
