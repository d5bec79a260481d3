"""Run directory, trackers and the progress line."""
