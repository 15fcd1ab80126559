"""The kernels' arithmetic without a GPU: Triton's interpreter, in a process of its own.

Triton decides whether to interpret when a kernel is defined, so that the variable must be set before the import.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", str(HERE / "interpreted"), "-q", "-o", "python_files=check_*.py"]
    command += ["-p", "no:cacheprovider", "-x"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 90
    assert "skipped" not in run.stdout
