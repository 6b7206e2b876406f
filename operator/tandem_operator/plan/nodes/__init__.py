"""Failing nodes: which they are, and what is done about them. Pure: a snapshot in, a plan out."""
