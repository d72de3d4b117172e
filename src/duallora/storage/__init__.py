"""What is written to disk: saved models and documents, whole or not at all."""
