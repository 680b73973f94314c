"""All benchmarks, one after the other: ``make bench``. Each prints both sides of a ratio measured in one run."""

from tests.benchmarks import bench_harvest, bench_import, bench_memory, bench_step

if __name__ == "__main__":
    for benchmark in (bench_import, bench_step, bench_harvest, bench_memory):
        print(f"\n{benchmark.__doc__.splitlines()[0]}")
        benchmark.main()
