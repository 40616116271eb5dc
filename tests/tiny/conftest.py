"""What the tests of the embedded model share."""

from __future__ import annotations

from pathlib import Path

import florence2_kserve.tiny

CHECKPOINT = Path(florence2_kserve.tiny.__file__).parent / "checkpoint"
