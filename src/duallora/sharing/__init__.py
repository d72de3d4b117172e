"""Saved models that are given away: a copy of one state, its card, and the hub."""
