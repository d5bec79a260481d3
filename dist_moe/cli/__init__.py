"""Commands: `dist-moe train`, `evaluate`, `plan`, `sweep` and the others, a file each."""
