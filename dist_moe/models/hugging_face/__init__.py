"""Hugging Face checkpoint directories, in and out. Only ``modeling_*`` need transformers."""
