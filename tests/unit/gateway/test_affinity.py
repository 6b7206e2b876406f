from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.gateway.affinity import PrefixMemory
from tandem_runtime.gateway.prompt_keys import PromptKeys
from tandem_runtime.prefix import block_keys, root_key

ROOT = root_key(b"layout", b"secret", "tenant", "")


def keys(ids: list[int], tenant: str = "tenant", salt: str = "") -> PromptKeys:
    return PromptKeys(block_keys(root_key(b"layout", b"secret", tenant, salt), ids, 16), 16)


def test_the_longest_beginning_that_each_pod_has_seen() -> None:
    memory = PrefixMemory()
    memory.learn("a", keys([1] * 64))
    memory.learn("b", keys([1] * 32 + [2] * 64))
    assert memory.held_tokens(keys([1] * 48 + [9] * 48)) == {"a": 48, "b": 32}
    assert memory.held_tokens(keys([1] * 32 + [2] * 70)) == {"a": 32, "b": 96}
    assert memory.held_tokens(keys([5] * 64)) == {}
    assert memory.held_tokens(keys([1] * 10)) == {}


def test_tenants_and_salts_stay_apart() -> None:
    memory = PrefixMemory()
    memory.learn("a", keys([1] * 64))
    assert memory.held_tokens(keys([1] * 64, tenant="other")) == {}
    assert memory.held_tokens(keys([1] * 64, salt="mine")) == {}


def test_long_prompts_are_remembered_page_by_page() -> None:
    memory = PrefixMemory()
    long = list(range(10_000))
    memory.learn("a", keys(long))
    assert len(memory) < 16 + 10_000 // 256 + 1
    shared = memory.held_tokens(keys(long[:5_000] + [0] * 1000))["a"]
    assert 5_000 - 256 <= shared <= 5_000


def test_what_was_not_used_for_longest_is_forgotten_and_ends_go_first() -> None:
    memory = PrefixMemory(max_keys=8)
    memory.learn("a", keys([1] * 64))
    memory.learn("b", keys([2] * 96))
    assert len(memory) == 8
    assert memory.held_tokens(keys([2] * 96)) == {"b": 96}
    assert memory.held_tokens(keys([1] * 64)) == {"a": 32}


@given(
    prompts=st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 1), max_size=80)), max_size=8
    ),
    asked=st.lists(st.integers(0, 1), max_size=80),
)
def test_never_more_than_was_learnt(prompts: list[tuple[str, list[int]]], asked: list[int]) -> None:
    memory = PrefixMemory()
    for pod, ids in prompts:
        memory.learn(pod, keys(ids))

    def common(ids: list[int]) -> int:
        same = 0
        while same < min(len(ids), len(asked)) and ids[same] == asked[same]:
            same += 1
        return same // 16 * 16

    expected: dict[str, int] = {}
    for pod, ids in prompts:
        expected[pod] = max(expected.get(pod, 0), common(ids))
    assert memory.held_tokens(keys(asked)) == {p: n for p, n in expected.items() if n}
