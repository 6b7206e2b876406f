"""The inference engine: a torch-free scheduler over paged KV, and the runner that computes."""
