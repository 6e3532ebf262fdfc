"""What makes a model quantise or run badly on HTP, found before a backend has to be blamed for it.

One small function per rule; every rule was measured on the simulated HTP with and without its flaw (documentation:
"Lint"), and what made no difference there is no rule.
"""
