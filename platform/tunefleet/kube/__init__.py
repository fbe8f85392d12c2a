"""Kubernetes objects as typed values: what we write, and what a manifest is checked against. Knows no Ray."""
