"""Text in, text out: the protocols that clients speak, over any `Backend`.

Torch-free, and shared by the gateway (whose backend is pairs of pods) and by a pod (whose backend
is its own engine).
"""
