"""Settings, registries, overrides and validation: how YAML becomes checked sections."""
