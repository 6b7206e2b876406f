"""A model on disk: where it is, what it is, and whether it is whole. No torch."""
