"""Plans: the memory and the time that a run will take, before it begins."""
