"""The chart's README, out of README.md.gotmpl and the comments in values.yaml.

``python -m tests.chart.readme`` writes it.
"""

from __future__ import annotations

from tests.chart import toolbox
from tests.chart.schemas import CHART

README = CHART / "README.md"


def render() -> str:
    """Returns what helm-docs makes.

    Raises:
        RuntimeError: If it fails.
    """
    done = toolbox.run("helm-docs", "-c", ".", "--sort-values-order=file", "--log-level=warning", "--dry-run")
    if done.returncode:
        raise RuntimeError(f"helm-docs failed: {done.stderr}")
    return done.stdout.strip() + "\n"


if __name__ == "__main__":
    README.write_text(render())
