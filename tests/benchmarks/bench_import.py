"""Import of every module of saelib against the import of torch alone."""

import statistics
import subprocess
import sys

from saelib.paths import ROOT

MODULES = sorted(path.stem for path in (ROOT / "saelib").glob("*.py") if path.stem != "__init__")


def seconds(statement: str) -> float:
    program = f"import time; begin = time.perf_counter(); {statement}; print(time.perf_counter() - begin)"
    return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def main():
    pairs = [
        (seconds("import torch"), seconds(f"import torch; from saelib import {', '.join(MODULES)}")) for _ in range(5)
    ]
    torch_alone, both = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"  torch {torch_alone:.2f} s, torch and all {len(MODULES)} modules {both:.2f} s")
    print(f"  saelib beyond torch {both - torch_alone:.2f} s (limit 1 s)")
    print(f"  import saelib alone {statistics.median(seconds('import saelib') for _ in range(5)):.3f} s")


if __name__ == "__main__":
    main()
