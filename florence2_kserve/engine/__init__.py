"""The generation engine: torch and transformers only, no kserve and no server code."""
