"""All benchmarks but the contest with other tools (bench_rivals, bench_frontier: half an hour and 1.9 GB) and bench_gpu, which
is for a GPU: ``make bench``.

Each prints both sides of a ratio measured in one run.
"""

import subprocess
import sys

if __name__ == "__main__":
    for name in ("import", "step", "harvest", "stream", "patch", "memory", "frozen"):
        print(f"\n{name}", flush=True)
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.bench_{name}"], check=True)
