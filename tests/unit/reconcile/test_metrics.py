"""The operator's own metrics."""

from __future__ import annotations

from tandem_operator.metrics import Metrics


def test_nodes_are_counted_by_phase() -> None:
    metrics = Metrics()
    metrics.node_health(["Draining", "Held", "Draining"], allowed=2)
    text = metrics.text().decode()
    assert 'tandem_nodes{phase="Draining"} 2.0' in text
    assert 'tandem_nodes{phase="Held"} 1.0' in text
    assert "tandem_nodes_in_repair_allowed 2.0" in text
    metrics.node_health([], allowed=1)
    assert 'tandem_nodes{phase="Draining"} 0.0' in metrics.text().decode()
