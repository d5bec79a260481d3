"""Export to and import from models of transformers."""
