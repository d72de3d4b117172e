"""Why an image got its answer, and which answers are most surely wrong."""
