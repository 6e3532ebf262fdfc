"""Numbers in, verdict out. Pure numpy: no I/O, no pytest, no other part of the project but the error classes."""
