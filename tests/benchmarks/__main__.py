"""All benchmarks, one after the other: ``make bench``. Each prints both sides of a ratio measured in one run."""

import subprocess
import sys

if __name__ == "__main__":
    for name in ("import", "step", "harvest", "memory"):
        print(f"\n{name}", flush=True)
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.bench_{name}"], check=True)
