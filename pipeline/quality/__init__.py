"""Figures of text and of models: pure functions, each with its definition and source."""
