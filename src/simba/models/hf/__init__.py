"""Models of transformers: a file a family, and what they share."""
