"""Run configs in YAML, shipped with the package."""
