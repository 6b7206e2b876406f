"""The engine on two CPU cores beside vLLM and llama.cpp: `python -m benchmarks.engine_cpu`."""
