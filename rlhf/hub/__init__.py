"""The hub and the libraries: names, model files, whether they are there, uploads."""
