"""The registered model and the ways to reach it."""
