"""``florence2 predictor`` with an engine whose device breaks on demand, for tests/test_predictor.py.

A request for HOLD tokens holds up the decoder; one for BREAK tokens breaks the device.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from florence2_kserve.sdk import import_sdk

HOLD, BREAK = 498, 499
REASON = "CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA to enable device-side assertions."
# Long enough for a busy machine to ask all that the test asks between the breakage and the end.
LAST_WORDS_S = 8.0


def main() -> None:
    import_sdk()
    from florence2_kserve import cli, predictor
    from florence2_kserve.engine import engine
    from florence2_kserve.engine.runner import Outcome, Runner

    class BreakingRunner(Runner):
        def decode(self) -> list[Outcome]:
            youngest = self.jobs()[-1]
            if youngest.request.max_new_tokens == BREAK:
                raise RuntimeError(REASON)
            if youngest.request.max_new_tokens == HOLD:
                time.sleep(0.01)
                return []
            return super().decode()

    class BreakingEngine(engine.InflightEngine):
        def _make_runner(self, *arguments: Any, **options: Any) -> Runner:
            return BreakingRunner(*arguments, **options)

        def close(self) -> None:
            if not self.is_healthy:
                threading.Event().wait()  # as joining a thread that hangs in the driver
            super().close()

    engine.InflightEngine = BreakingEngine
    predictor._LAST_WORDS_S = LAST_WORDS_S
    cli.main()


if __name__ == "__main__":
    main()
