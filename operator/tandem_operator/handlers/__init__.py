"""The shell around the operator: Kopf watches and indexes, and nothing else of it is used."""
