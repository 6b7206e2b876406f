"""Models: where their weights are, what they say of themselves, and how they compute."""
