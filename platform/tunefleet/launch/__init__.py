"""One run, somewhere: the driver's side, from a recipe to a finished folder."""
