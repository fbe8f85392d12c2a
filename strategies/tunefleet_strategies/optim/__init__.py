"""How trainable parameters are grouped, the optimizers built from the groups, and the optimizers of this project."""
