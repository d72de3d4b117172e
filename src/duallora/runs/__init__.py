"""A stream learned task by task, its figures, and several runs side by side."""
