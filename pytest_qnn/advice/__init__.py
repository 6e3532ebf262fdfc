"""Choosing a backend from what really happens on each, measured; apart from how it is asked for and shown."""
