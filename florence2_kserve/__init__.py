"""Microsoft Florence-2 served as a Kubernetes-native KServe InferenceService."""

__version__ = "0.1.0"
