"""Callbacks that recipes share: swap search and placement while training."""
