"""A serving pod: one engine, its HTTP and gRPC endpoints, its end of the KV handoff."""
