"""The defect bench: what the gate catches, and how seldom it cries wolf, measured beside the rules that others use."""
