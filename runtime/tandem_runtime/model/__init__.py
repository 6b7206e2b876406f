"""Models that compute: layers, weights on a device, rotary embedding."""
