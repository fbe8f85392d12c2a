"""Model, method and optimizer put onto the engine that the plan names: one file for each kind of engine."""
