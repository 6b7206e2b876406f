"""Slow pods: how soon they are found, what their removal is worth, and when nobody is slow."""
