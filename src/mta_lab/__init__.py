"""The laboratory of mta: recipes, exhibits, and baselines that reproduce papers, and the privacy attack."""
