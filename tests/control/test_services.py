"""Services have endpoints, once pods have addresses that EndpointSlices accept.

The local cluster's pods live on loopback, which EndpointSlices refuse, so its endpoint controllers
are off. Here a cluster runs in a network namespace of its own, with addresses that are not
loopback and the controllers on: what the local cluster leaves out is left out for that one reason.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys

INSIDE = """
import fcntl, json, os, socket, struct, sys, time
from tandem.cluster.down import down
from tandem.cluster.process import identify
from tandem.cluster.running import KubectlError
from tandem.cluster.spec import ClusterSpec
from tandem.cluster.up import up

SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, IFF_UP = 0x8914, 0x8916, 0x891C, 0x1

def request(code, name, payload):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, code, struct.pack("16s24s", name.encode(), payload))

def address(text):
    return struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(text))

request(SIOCSIFFLAGS, "lo", struct.pack("h", IFF_UP))
# On a loopback interface the whole network of an address is local: 10.64.0.0/10 is ours.
request(SIOCSIFADDR, "lo:1", address("10.64.0.1"))
request(SIOCSIFNETMASK, "lo:1", address("255.192.0.0"))

POD = {
    "metadata": {"labels": {"app": "web"}},
    "spec": {"terminationGracePeriodSeconds": 1, "containers": [{
        "name": "c", "image": "tandem.dev/runtime:0.1.0", "command": ["sleep", "600"],
        "ports": [{"name": "web", "containerPort": 8000}]}]},
}
OBJECTS = [
    {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
     "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": POD}},
    {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
     "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "web"}]}},
]
name = sys.argv[1]
spec = ClusterSpec(name=name, nodes=2, operator=False, loopback=False)
try:
    cluster = up(spec, lambda _: None, identify(os.getppid()))
    bundle = {"apiVersion": "v1", "kind": "List", "items": OBJECTS}
    cluster.kubectl("apply", "-f", "-", input=json.dumps(bundle))
    cluster.kubectl("rollout", "status", "deployment/web", "--timeout=30s")
    pods = json.loads(cluster.kubectl("get", "pods", "-l", "app=web", "-o", "json"))["items"]
    ips = sorted(pod["status"]["podIP"] for pod in pods)

    def endpoints():
        selector = "kubernetes.io/service-name=web"
        text = cluster.kubectl("get", "endpointslices", "-l", selector, "-o", "json")
        return {
            (e["addresses"][0], e["conditions"]["ready"], port["port"])
            for piece in json.loads(text)["items"]
            for e in piece.get("endpoints") or []
            for port in piece["ports"]
        }

    deadline = time.monotonic() + 20
    while endpoints() != {(ip, True, 8000) for ip in ips} and time.monotonic() < deadline:
        time.sleep(0.2)
    print(json.dumps({"pods": ips, "endpoints": sorted(endpoints())}))
finally:
    down(name)
"""


def test_a_service_has_its_pods_as_endpoints() -> None:
    name = f"routed-{secrets.token_hex(3)}"
    answer = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", INSIDE, name],
        capture_output=True,
        text=True,
        timeout=180,
        env=dict(os.environ),
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    assert len(found["pods"]) == 2
    assert all(ip.startswith("10.65.") for ip in found["pods"])
    assert found["endpoints"] == [[ip, True, 8000] for ip in found["pods"]]
