"""How many replicas a pool should have: a pure law, the same live, replayed and simulated.

`law.decide` decides for one pool, `fleet.decide_fleet` for pools that share a GPU budget. They know
nothing of Kubernetes: a `PoolWindow` goes in, a `Decision` with its reason comes out, and what has
to be remembered is a `ScalingState` that the caller keeps.
"""
