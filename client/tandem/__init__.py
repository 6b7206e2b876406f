"""The `tandem` command: the local cluster, rollouts, the demo."""

__version__ = "0.1.0"
