"""What the kernels and a step of an 8B-shaped model reach on one GPU, beside its limits."""
