"""``florence2 batch``: asks about any number of pictures, and can be killed and started again at any time.

| module | knows |
|---|---|
| ``sources`` | where pictures come from, and in which order |
| ``journal`` | the lines of the output, which are also all that a rerun knows |
| ``index`` | what those lines say is done |
| ``identity`` | when two questions are the same |
| ``run`` | reading, asking and recording, bounded and all at once |
| ``progress`` | what is said meanwhile |
| ``parquet`` | the output as a Parquet file |
| ``command`` | flags |
"""
