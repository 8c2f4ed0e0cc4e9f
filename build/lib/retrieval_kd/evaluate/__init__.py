"""How good results are, whether a difference is one, and what a query costs."""
