"""Ranks that share a vocabulary or a sequence: what they agree on, and how their parts become one number."""
