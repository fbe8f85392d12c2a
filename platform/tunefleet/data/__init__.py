"""Rows of any usual layout in, memory-mapped token rows and batches out."""
