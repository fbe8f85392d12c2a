"""Who owns weights and optimizer of a run on its ranks: one engine for each way to share them out."""
