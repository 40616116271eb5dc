"""The embedded tiny Florence-2: its scenes, its training and its files."""
