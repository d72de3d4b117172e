"""Images: found, decoded, transformed, kept."""
