"""What a model is turned into, and the caches that keep results by content."""
