"""How trainable parameters are grouped, and the optimizers that are built from the groups."""
