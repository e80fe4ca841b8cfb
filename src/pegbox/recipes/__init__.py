"""The catalogue: one YAML file per published system."""
