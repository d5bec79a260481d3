"""Hugging Face checkpoint directories, in and out. Only ``modeling_dist_moe`` needs transformers."""
