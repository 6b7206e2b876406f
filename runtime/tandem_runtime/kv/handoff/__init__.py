"""The KV handoff between a prefill pod and a decode pod (docs/design/handoff.md)."""
