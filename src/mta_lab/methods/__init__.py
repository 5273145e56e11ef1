"""Other papers' methods. ``pyproject.toml`` names them for recipes, in the group ``mta.methods`` of entry points."""
