"""``florence2 benchmark``: the engine beside transformers' ``generate`` on static batches.

Both run in one process on the same seeded random weights and answer the same requests. It needs torch,
transformers, timm and einops, no server and no files: ``python -m florence2_kserve.benchmark`` runs from a
checkout.

Modules: `models` builds the weights, `workload` the requests, `baseline` is what is compared with, `sides`
drives either, `flops` and `roofline` say what the work costs, `divergence` explains differing tokens, `run`
puts it together and `report` prints it.
"""
