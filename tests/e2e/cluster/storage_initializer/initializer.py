"""Entry point of the storage initializer's image: KServe starts it with pairs of a source URI and a folder."""

import os
import sys

from kserve_storage import Storage


def main() -> int:
    sources, folders = sys.argv[1::2], sys.argv[2::2]
    if not sources or len(sources) != len(folders):
        print("usage: initializer SOURCE_URI FOLDER [SOURCE_URI FOLDER …]", file=sys.stderr)
        return 2
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    try:
        Storage.download_files(sources, folders)
    except Exception as error:  # the pod's termination message is the end of this log
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
