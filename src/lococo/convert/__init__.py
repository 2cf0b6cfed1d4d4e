"""Checkpoints of other layouts, rewritten so that transformers' own classes load them, and back."""
