"""A saved model behind an address (extra ``serve``): requests, limits, forward passes, new generations."""
