"""What turns features into class probabilities: class statistics, heads, and how they are joined."""
