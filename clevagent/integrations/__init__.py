"""The published import paths: one module per framework, which only names what its adapter has."""
