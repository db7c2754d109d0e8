"""Nearest neighbours among unit vectors, and the arithmetic on them: density, transport, greedy choice.

Everything here works on arrays and on tables of vectors; it knows no method and no model. Distances are
Euclidean between vectors of length 1, so they lie in [0, 2] and d^2 = 2 - 2 cos.
"""
