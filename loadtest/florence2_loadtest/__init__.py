"""Load tests of a Florence-2 service: how fast, how slow at worst, how it scales, with which settings."""
