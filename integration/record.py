"""A plugin of pytest that writes down what ran, under which versions, and how it ended.

    pytest -p record --record FILE ...

`integration/run.py` makes the table of hosts from such files. A run with `-k`, of single tests, or that was interrupted
writes none.
"""

import json
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "nncf", "brevitas", "openvino", "onnxruntime", "numpy")
"""What decides how a host behaves."""

COUNTED = ("passed", "failed", "error", "skipped", "xfailed")
"""The outcomes of tests; any failure or error makes a run fail."""


def pytest_addoption(parser: Any) -> None:
    """Add the option."""
    parser.addoption("--record", metavar="FILE", type=Path, help="write versions and counts into this file")


def pytest_configure(config: Any) -> None:
    """Remove the file of an earlier run, so that one that dies does not leave it."""
    if config.getoption("record") and not hasattr(config, "workerinput"):
        config.getoption("record").unlink(missing_ok=True)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: Any) -> None:
    """Write the file, in the process that counts."""
    file, option = config.getoption("record"), config.option
    if not file or exitstatus not in (0, 1) or option.keyword or any("::" in path for path in config.args):
        return
    stats = terminalreporter.stats
    record = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "packages": versions(),
        "tests": option.markexpr,
        **{outcome: len(stats.get(outcome, ())) for outcome in COUNTED},
        "failures": sorted({report.nodeid for outcome in ("failed", "error") for report in stats.get(outcome, ())}),
    }
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Find the versions of what is installed, without the name of a build."""
    installed = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    return {name: installed[name].partition("+")[0] for name in PACKAGES if name in installed}
