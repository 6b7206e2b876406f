"""The decisions, pure: from a snapshot to actions with reasons.

No module in here does I/O, reads a clock, draws a random number or logs.
"""
