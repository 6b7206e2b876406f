"""The custom resources: pydantic models from which crds/ is generated."""
