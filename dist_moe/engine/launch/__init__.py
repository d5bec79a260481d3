"""Launch environment, process groups, emulated ranks, requests to stop."""
