"""The V2 / Open Inference Protocol: the only place that knows tensors' names, shapes and bytes.

``public``    the contract with clients, ``internal`` the one between transformer and predictor,
``tensors``   V2 tensors as numpy arrays, ``rest`` bodies over REST, ``wire`` messages over gRPC.
"""
