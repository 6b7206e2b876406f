"""Every selector of a policy's query is confined to one namespace, or the query is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_operator.plan.promql import PromqlRefused, confined

NS = 'namespace="team"'


@pytest.mark.parametrize(
    ("query", "result"),
    [
        ("up", f"up{{{NS}}}"),
        ("up{}", f"up{{{NS}}}"),
        ('sum(rate(vllm:x_total{fleet="a"}[1m])) by (pod)',
         f'sum(rate(vllm:x_total{{{NS},fleet="a"}}[1m])) by (pod)'),
        ("histogram_quantile(0.95, sum by (le) (rate(a_bucket[1m] offset 5m)))",
         f"histogram_quantile(0.95, sum by (le) (rate(a_bucket{{{NS}}}[1m] offset 5m)))"),
        ("a / on(pod) group_left(b) c", f"a{{{NS}}} / on(pod) group_left(b) c{{{NS}}}"),
        ("a * on(x) group_left b", f"a{{{NS}}} * on(x) group_left b{{{NS}}}"),
        ("max_over_time(rate(a[1m])[5m:30s])", f"max_over_time(rate(a{{{NS}}}[1m])[5m:30s])"),
        ('{__name__="x"}', f'{{{NS},__name__="x"}}'),
        ('b{c=~"d{}"}', f'b{{{NS},c=~"d{{}}"}}'),
        ("sum(a) or vector(0)", f"sum(a{{{NS}}}) or vector(0)"),
        ("a > bool 1e3", f"a{{{NS}}} > bool 1e3"),
        ("a @ start()", f"a{{{NS}}} @ start()"),
        ('up{namespace="kube-system"}', f'up{{{NS},namespace="kube-system"}}'),
        ("1000 * a[1h30m]", f"1000 * a{{{NS}}}[1h30m]"),
    ],
)  # fmt: skip
def test_confined(query: str, result: str) -> None:
    assert confined(query, "team") == result


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("1 + 1", "it selects no metric"),
        ('label_replace("a")', "it selects no metric"),
        ("a{", "a { is not closed"),
        ("sum by (le", "a \\( is not closed"),
        ("a # b{}", "is no PromQL; comments are not taken"),
        ('a{b="c', "is no PromQL"),
        ("sum(by)", "by is followed by no label list"),
        ("a; b", "is no PromQL"),
    ],
)
def test_refused(query: str, sentence: str) -> None:
    with pytest.raises(PromqlRefused, match=sentence):
        confined(query, "team")


names = st.sampled_from(("a", "b_total", "vllm:c", "sum", "rate_x"))
labels = st.sampled_from(("", '{d="e"}', "{}", '{f!~"g,{h}"}', "{ }"))
selectors = st.builds(str.__add__, names, labels)
queries = st.recursive(
    selectors,
    lambda inner: st.one_of(
        st.builds(lambda q: f"sum by (pod, le) ({q})", inner),
        st.builds(lambda q: f"avg({q}) without(x)", inner),
        st.builds(lambda q: f"rate({q}[5m] offset 1m)", inner),
        st.builds(lambda p, q: f"({p}) / on (pod) group_left () ({q})", inner, inner),
        st.builds(lambda p, q: f"{p}>bool {q}", inner, inner),
    ),
    max_leaves=8,
)


@given(queries)
def test_every_selector_has_the_matcher(query: str) -> None:
    found = confined(query, "team")
    bare = re.sub(r'"[^"]*"', '""', query)
    for word in ("sum by (pod, le)", "avg", "without(x)", "rate(", "offset", "on (pod)",
                 "group_left", "bool"):  # fmt: skip
        bare = bare.replace(word, " ")
    metrics = re.findall(r"(?<![\w:])(?:a|b_total|vllm:c|sum|rate_x)(?![\w:])", bare)
    assert found.count(NS) == len(metrics)
    assert found.replace(NS + ",", "").replace("{" + NS + "}", "").replace(NS, "") in (
        query,
        query.replace("{}", ""),
    )
