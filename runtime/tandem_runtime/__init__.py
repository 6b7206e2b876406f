"""The data plane of Tandem: gateway, prefill and decode pods."""

__version__ = "0.1.0"
