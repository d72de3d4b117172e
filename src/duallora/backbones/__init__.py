"""Frozen vision transformers: which there are, where their weights come from, what they compute."""
