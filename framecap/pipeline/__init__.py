"""The caption job: frame shards through Ray Data into caption shards, each frame exactly once."""
