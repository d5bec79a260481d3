"""Areas of input that `tools/fuzz.py` draws from: odd files, values and variables, and what must come of each."""
