"""All I/O with the Kubernetes API; nothing else imports its client."""
