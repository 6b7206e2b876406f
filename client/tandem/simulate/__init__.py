"""A fleet in simulated time: requests in, latencies and GPU-hours out.

Discrete events over engine steps priced by `tandem.plan`; pools scaled by the operator's own law.
"""
