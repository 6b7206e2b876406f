"""Named contexts on the real runtime, through a gateway, with the unmodified openai client.

One pod with a disk tier: a conversation about a document gets bit for bit the answer that it gets
cold, from cached tokens, also after the pod was killed and another one found its files.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import openai
from tandem_runtime import contract
from tandem_runtime.contract import KV_PAGE_TOKENS, Role

NAME = "smollm2-135m"
DOCUMENT = "".join(
    f"Paragraph {n}: the tandem number {n} was built in {1900 + n} and carries {n % 7} bags. "
    for n in range(14)
)
QUESTION: list[Any] = [{"role": "user", "content": "When was the tandem number 3 built?"}]
LIMIT_S = 240


def status(client: openai.OpenAI, id_: str) -> dict[str, Any]:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        try:
            found: Any = client.get(f"/contexts/{id_}", cast_to=object)
        except openai.InternalServerError:
            continue
        if found["status"] != "building":
            return dict(found)
        time.sleep(0.2)
    raise AssertionError(f"{id_} was never kept")


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        model=NAME, temperature=0, max_tokens=8, logprobs=True, timeout=LIMIT_S, **fields
    )


def test_a_document_is_prefilled_once(start_pod: Any, gateway: Any, tmp_path: Path) -> None:
    disk = ("--disk-tier-size", "2Gi", "--disk-tier-dir", str(tmp_path / "kv"))
    pod = start_pod("reader-0", Role.BOTH, *disk)
    gateway.show(pod.view())
    system: Any = {"role": "system", "content": DOCUMENT}
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=8) as client:
        # Another tenant's: nothing of it is cached for this one.
        cold = ask(
            client,
            messages=[system, *QUESTION],
            extra_headers={contract.HEADER_TENANT: "somebody"},
        )
        made: Any = client.post(
            "/contexts",
            body={"model": NAME, "messages": [system], "tier": "disk", "ttl_seconds": 3600},
            cast_to=object,
        )
        tokens = made["usage"]["total_tokens"]
        assert tokens > KV_PAGE_TOKENS
        assert status(client, made["id"])["status"] == "ready"
        warm = ask(client, messages=QUESTION, extra_body={"context": made["id"]})
        assert warm.choices == cold.choices
        assert warm.usage.prompt_tokens == cold.usage.prompt_tokens
        assert cold.usage.prompt_tokens_details.cached_tokens == 0
        assert warm.usage.prompt_tokens_details.cached_tokens >= KV_PAGE_TOKENS
        pod.kill()
        restarted = start_pod("reader-0", Role.BOTH, *disk)
        gateway.show(restarted.view())
        assert status(client, made["id"])["status"] == "ready"
        again = ask(client, messages=QUESTION, extra_body={"context": made["id"]})
        assert again.choices == cold.choices
        assert again.usage.prompt_tokens_details.cached_tokens >= KV_PAGE_TOKENS
        client.delete(f"/contexts/{made['id']}", cast_to=object)
