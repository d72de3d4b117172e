"""Adapters beside the frozen projections: where they sit, what they compute, which directions are theirs."""
