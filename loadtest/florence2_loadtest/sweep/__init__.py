"""Search over settings: each configuration in fresh servers, under the same load."""
