"""Typed configuration: sections, one class a stage, and the YAML reader."""
