"""Measurements of what GRAPES costs; `make bench` runs them."""
