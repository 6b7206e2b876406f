"""What a step takes on an accelerator of the catalogue: arithmetic on data sheets and shapes."""
