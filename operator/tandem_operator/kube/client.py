"""The verbs that the operator uses, over kubernetes.aio's transport and credentials.

Objects are plain JSON dicts: the plan compares and hashes them, and generated models would drop
fields that they do not know. No verb retries: the queue does, with the whole reconcile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException

from tandem_operator.resources import PODS, Ref, Resource, resource_of

__all__ = ["ApiError", "ApiKube", "ConfigException", "Kube", "connect"]

Body = dict[str, Any]
TIMEOUT_S = 30.0
PAGE_SIZE = 500


class ApiError(Exception):
    """What the API server answered instead of an object. `str()` is its sentence."""

    def __init__(self, status: int, reason: str, message: str, causes: Sequence[str] = ()) -> None:
        super().__init__(message or f"{status} {reason}")
        self.status = status
        self.reason = reason
        self.causes = causes

    @property
    def namespace_terminating(self) -> bool:
        """The namespace is being deleted: nothing can be made in it, and nothing needs to be."""
        return "NamespaceTerminating" in self.causes


class Kube(Protocol):
    """The Kubernetes API. Every verb raises ApiError, or OSError when the server is away."""

    async def get(self, target: Ref) -> Body | None:
        """The object of that name; None if there is none."""

    async def list(
        self, resource: Resource, namespace: str, selector: Mapping[str, str]
    ) -> list[Body]:
        """All objects with the labels, as the server has them now; kind and version filled in.

        With the namespace "" those of all namespaces, or the cluster's.
        """

    async def create(self, manifest: Body, *, manager: str, dry_run: bool = False) -> Body:
        """POST, with unknown fields refused."""

    async def apply(self, manifest: Body, *, manager: str) -> Body:
        """Server-side apply; conflicts with other managers are taken over."""

    async def apply_status(self, target: Ref, status: Mapping[str, Any], *, manager: str) -> Body:
        """Server-side apply of a whole status."""

    async def patch(self, target: Ref, change: Body, *, manager: str) -> Body:
        """JSON merge patch."""

    async def scale(self, target: Ref, replicas: int, *, manager: str) -> None:
        """Write spec.replicas through the scale subresource."""

    async def delete(self, target: Ref, *, grace_s: int | None = None) -> None:
        """DELETE, with the uid as precondition where the ref has one."""

    async def evict(self, target: Ref) -> None:
        """POST an eviction of a pod; ApiError 429 while a budget forbids it."""

    async def count_pods(self, node: str, ignoring: Mapping[str, str]) -> int:
        """Pods on a node that are neither a DaemonSet's, nor the node's own, nor have the label
        `ignoring`."""

    async def replace(self, manifest: Body) -> Body:
        """PUT; fails with 409 if the resourceVersion in it is not the live one."""


class ApiKube:
    """`Kube` over HTTP."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    async def close(self) -> None:
        await self._client.close()

    async def get(self, target: Ref) -> Body | None:
        try:
            return await self._request("GET", _path(target))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(
        self, resource: Resource, namespace: str, selector: Mapping[str, str]
    ) -> list[Body]:
        query = {
            "labelSelector": ",".join(f"{k}={v}" for k, v in sorted(selector.items())),
            "limit": str(PAGE_SIZE),
        }
        items = await self._pages(_collection(resource, namespace), query)
        head = {"apiVersion": resource.api_version, "kind": resource.kind}
        return [head | item for item in items]

    async def _pages(self, path: str, query: dict[str, str]) -> Sequence[Body]:
        """All items of a list that the server gives in parts."""
        items: Sequence[Body] = []
        while True:
            page = await self._request("GET", path, query)
            items = [*items, *page["items"]]
            more = page["metadata"].get("continue")
            if not more:
                return items
            query["continue"] = more

    async def create(self, manifest: Body, *, manager: str, dry_run: bool = False) -> Body:
        path = _collection(resource_of(manifest), manifest["metadata"]["namespace"])
        query = {"fieldManager": manager, "fieldValidation": "Strict"}
        query |= {"dryRun": "All"} if dry_run else {}
        # As YAML, which JSON is: the server re-encodes it. The bytes of a ControllerRevision's data
        # are kept as they were sent otherwise, and every later patch, which re-encodes them, is
        # refused because data is immutable.
        text = json.dumps(manifest, ensure_ascii=False)
        return await self._request("POST", path, query, text, "yaml")

    async def apply(self, manifest: Body, *, manager: str) -> Body:
        meta = manifest["metadata"]
        path = _path(Ref(resource_of(manifest), meta["namespace"], meta["name"]))
        query = {"fieldManager": manager, "force": "true", "fieldValidation": "Strict"}
        return await self._request("PATCH", path, query, manifest, "apply-patch+yaml")

    async def apply_status(self, target: Ref, status: Mapping[str, Any], *, manager: str) -> Body:
        manifest: Body = {
            "apiVersion": target.resource.api_version,
            "kind": target.resource.kind,
            # The uid makes a status that was computed for a deleted object fail on its successor.
            "metadata": {"name": target.name, "uid": target.uid, **_namespace(target)},
            "status": dict(status),
        }
        query = {"fieldManager": manager, "force": "true", "fieldValidation": "Strict"}
        path = f"{_path(target)}/status"
        return await self._request("PATCH", path, query, manifest, "apply-patch+yaml")

    async def patch(self, target: Ref, change: Body, *, manager: str) -> Body:
        if target.uid:
            change = change | {"metadata": {**change.get("metadata", {}), "uid": target.uid}}
        query = {"fieldManager": manager}
        return await self._request("PATCH", _path(target), query, change, "merge-patch+json")

    async def scale(self, target: Ref, replicas: int, *, manager: str) -> None:
        path = f"{_path(target)}/scale"
        change: Body = {"spec": {"replicas": replicas}}
        await self._request("PATCH", path, {"fieldManager": manager}, change, "merge-patch+json")

    async def delete(self, target: Ref, *, grace_s: int | None = None) -> None:
        options = _delete_options(target)
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        await self._request("DELETE", _path(target), body=options)

    async def evict(self, target: Ref) -> None:
        eviction: Body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": target.name, "namespace": target.namespace},
            "deleteOptions": _delete_options(target),
        }
        await self._request("POST", f"{_path(target)}/eviction", body=eviction)

    async def count_pods(self, node: str, ignoring: Mapping[str, str]) -> int:
        query = {"fieldSelector": f"spec.nodeName={node}", "limit": str(PAGE_SIZE)}
        pods = await self._pages(_collection(PODS, ""), query)
        return sum(not _stays(pod, ignoring) for pod in pods)

    async def replace(self, manifest: Body) -> Body:
        meta = manifest["metadata"]
        path = _path(Ref(resource_of(manifest), meta["namespace"], meta["name"]))
        return await self._request("PUT", path, body=manifest)

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Body | str | None = None,
        content: str = "json",
    ) -> Body:
        headers = {"Accept": "application/json", "Content-Type": f"application/{content}"}
        verb, url, headers, payload, _ = await self._client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = await self._client.call_api(
                verb,
                url,
                headers,
                payload,
                _request_timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            )
            answer = await response.read()
        except aiohttp.ClientError as error:
            # Not all of them are OSErrors: not that of a server that closes the connection.
            raise OSError(f"{method} {path}: {type(error).__name__} {error}") from error
        return _decode(response.status, answer)


def _collection(resource: Resource, namespace: str) -> str:
    """The API path of a kind's objects; of all namespaces with ""."""
    if not namespace:
        return f"{resource.path}/{resource.plural}"
    return f"{resource.path}/namespaces/{namespace}/{resource.plural}"


def _path(target: Ref) -> str:
    return f"{_collection(target.resource, target.namespace)}/{target.name}"


def _namespace(target: Ref) -> Body:
    return {"namespace": target.namespace} if target.namespace else {}


def _delete_options(target: Ref) -> Body:
    options: Body = {"apiVersion": "v1", "kind": "DeleteOptions"}
    return options | ({"preconditions": {"uid": target.uid}} if target.uid else {})


def _stays(pod: Body, ignoring: Mapping[str, str]) -> bool:
    """Whether a pod has nothing to lose when its node is given up: ours are moved, a DaemonSet's
    and the node's own belong to the node."""
    meta, status = pod["metadata"], pod.get("status") or {}
    owners = {owner.get("kind") for owner in meta.get("ownerReferences") or ()}
    ours = ignoring.items() <= (meta.get("labels") or {}).items()
    ended = status.get("phase") in ("Succeeded", "Failed")
    return ours or ended or bool(owners & {"DaemonSet", "Node"})


def _decode(status: int, content: bytes) -> Body:
    try:
        body: Body = json.loads(content)
    except ValueError:
        body = {"message": content.decode(errors="replace")[:500]}
    if status >= 300:
        causes = [str(c.get("reason")) for c in (body.get("details") or {}).get("causes") or ()]
        raise ApiError(status, str(body.get("reason", "")), str(body.get("message", "")), causes)
    return body


async def connect() -> ApiKube:
    """The API server of the cluster that this process runs in, else that of the kubeconfig.

    Raises ConfigException when there is neither.
    """
    configuration = Configuration()
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        config.load_incluster_config(configuration)
    else:
        await config.load_kube_config(client_configuration=configuration)
    client = ApiClient(configuration)
    client.user_agent = "tandem-operator"
    return ApiKube(client)
