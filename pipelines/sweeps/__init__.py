"""Searches over settings: what may vary, what is wanted, and what came out."""
