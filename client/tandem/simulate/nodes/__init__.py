"""Failing nodes in simulated time: pods and nodes are events, load is rates.

The operator's own plan for nodes (`tandem_operator.plan.nodes`) decides what is done about them.
"""
