"""How contexts scale: one of 1,000,000 tokens, 10,000 of them, and what admitting one costs steps.

.venv/bin/python -m benchmarks.context_scale
"""
