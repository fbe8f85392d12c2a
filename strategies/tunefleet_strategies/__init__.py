"""Fine-tuning methods as plain PyTorch: one file for each method, the contract they share, and their registry.

Start at `contract.py` for what a method is and at `registry.py` for which ones exist.
"""
