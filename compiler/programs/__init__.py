"""A scheduler → its table of linear coefficients → programs, and the arithmetic of their steps."""
