"""The gateway: text in front, pairs of pods behind. Loads neither torch nor Kopf."""
