"""What runs inside a Ray Train worker. `run.py` is the table of contents."""
