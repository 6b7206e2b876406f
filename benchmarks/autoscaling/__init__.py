"""Policies that size pools, side by side in one simulator on the same traces."""
