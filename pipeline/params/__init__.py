"""What each parameter of params.yaml means, with its type and range: one module per section.

params.yaml holds the values; the classes here hold names, types, ranges and meaning.
"""
