"""The frozen base model: loading, attention over token trees, encoding, generation, identity."""
