"""The recipe: flat YAML outside, typed sections inside. Start at `read.py`; `sections.py` and `owners.py` say whose
key is whose.
"""
