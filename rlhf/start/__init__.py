"""From a model and data to a directory with a chain of configs that runs."""
