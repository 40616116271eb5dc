"""The grid that the replaced deployment was tuned with, in our settings' names."""

from __future__ import annotations

from florence2_loadtest.servers import FIELDS, Half
from florence2_loadtest.sweep.space import Space, make_space

REPLACED = "replaced"
# Triton's max_batch_size, max_queue_delay_microseconds and instance count. An instance of its processing model was a
# Python process that decoded and tokenised one batch at a time; here that is done by threads, which Python's lock
# doesn't hold up, since decoding and resizing leave it: so it is their number that stands for instances.
_REPLACED = {"max_batch_size": "6,12,24,36", "admission_delay_us": "0,100,200", "max_asyncio_workers": "2,3,4"}
_NOTES: dict[Half, str] = {
    "both": "Triton's instances of its CPU model are max_asyncio_workers, the threads that decode and tokenise.",
    "transformer": "The transformer prepares each request by itself, so that max_batch_size and admission_delay_us "
    "mean nothing to it: of the 36 configurations 3 are different, max_asyncio_workers in place of instances.",
    "predictor": "As there, the model has one instance: 12 configurations.",
}


def replaced_grid(target: Half) -> Space:
    """Returns the grid for `target`: brute force over 6/12/24/36 rows × 0/100/200 µs × 2/3/4 instances.

    Settings that mean nothing to the target are left out, and with them the duplicates that they would make.
    """
    # The predictor takes max_asyncio_workers too, but decodes and tokenises nothing.
    without = {"max_asyncio_workers"} if target == "predictor" else set()
    named = {name: values for name, values in _REPLACED.items() if name in FIELDS[target] - without}
    return Space(make_space(named, target).parameters, notes=(_NOTES[target],))
