"""Samples of the model and of people: draw, measure and compare them, search decoding parameters, write the report."""
