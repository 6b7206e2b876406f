"""The resolver: what a model is, from its headers, for the operator to plan with."""
