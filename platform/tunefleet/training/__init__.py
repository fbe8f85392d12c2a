"""Tensors in, a stream of steps out: the loop, its loss, its engines and its checkpoints. It does not know Ray."""
