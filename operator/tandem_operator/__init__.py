"""The control plane of Tandem: reads custom resources, writes pods, never sees a token."""

__version__ = "0.1.0"
