"""The parameters of params.yaml: their names, types, ranges and meaning, in one module per section."""
