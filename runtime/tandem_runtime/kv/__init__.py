"""Where KV cache lives and how it moves."""
