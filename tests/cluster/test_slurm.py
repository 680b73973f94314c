"""`make replicate EXECUTOR=slurm` on a real SLURM of two nodes on loopback: one dies; two are faster than one.

Equal means: every file that the notebooks keep under the run folder and among the figures has the same bytes. Left out is what
tells how a run went and not what came out: executed notebooks (of them the checked cells' outputs are compared), Snakemake's
records, and the field "seconds" of a JSON file. Both runs use one thread, since sums depend on their order.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import datetime

import nbformat
import pytest

from saelib.paths import RAW, ROOT
from tests.cluster import slurm

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(slurm.missing()),
        reason=f"{', '.join(slurm.missing())} not installed: apt-get install slurm-wlm munge",
    ),
]
PART = "02_train_dictionaries_part"
ON_SLURM = ("EXECUTOR=slurm", "THREADS=1")
# there is no accounting here; look often, since jobs are short
FLAGS = "--slurm-status-command squeue --slurm-init-seconds-before-status-checks 5"


@contextmanager
def make(data, *variables, environment=os.environ):
    """A started `make replicate PROFILE=smoke`, with data in `data`; nothing of it is left afterwards."""
    (data / "runs").mkdir(parents=True, exist_ok=True)
    if not (data / "raw").exists():
        (data / "raw").symlink_to(RAW)
    command = ["make", "replicate", "PROFILE=smoke", f"VENV={sys.prefix}", *variables]
    more = {"SAELIB_DATA": str(data), "PATH": f"{sys.prefix}/bin{os.pathsep}{environment['PATH']}"}
    with open(data / "log", "w") as log:
        streams = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        run = subprocess.Popen(command, cwd=ROOT, env={**environment, **more}, **streams)
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def succeed(run, data):
    """Wait for the end; an hour is for a machine that does other things too."""
    assert run.wait(3600) == 0, (data / "log").read_text()[-6000:]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run without a cluster."""
    data = tmp_path_factory.mktemp("local")
    with make(data, "CORES=1") as run:
        succeed(run, data)
    assert not (data / "runs/smoke/parts").exists()
    return data


def kept(data) -> dict:
    """Content of all that a run keeps, by path."""
    found = {}
    for top in ("runs/smoke", "figures/smoke"):
        for path in sorted((data / top).rglob("*")):
            name = str(path.relative_to(data))
            if path.is_file() and not name.startswith(("runs/smoke/notebooks/", "runs/smoke/parts/")):
                content = path.read_bytes()
                found[name] = json.dumps(timeless(json.loads(content))) if path.suffix == ".json" else content
    for path in sorted((data / "runs/smoke/notebooks").glob("*.ipynb")):
        cells = [c for c in nbformat.read(path, 4).cells if "nbval-check-output" in c.metadata.get("tags", [])]
        found[path.name] = [json.dumps(cell.outputs) for cell in cells]
    return found


def timeless(content):
    if isinstance(content, dict):
        return {name: timeless(value) for name, value in content.items() if name != "seconds"}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def is_part(job) -> bool:
    return PART in job["Comment"]


def test_a_run_that_loses_a_node_ends_as_a_local_run(local, tmp_path):
    data, place = tmp_path / "data", tmp_path / "slurm"
    place.mkdir()
    with (
        slurm.cluster(place) as cluster,
        make(data, *ON_SLURM, f"FLAGS={FLAGS}", environment=cluster.environment) as run,
    ):

        def finished():
            return {path: path.stat().st_mtime_ns for path in (data / "runs/smoke/dictionaries").glob("*/*.json")}

        def at_work():
            """The job of a part on the second node, once there is a dictionary of its hook."""
            jobs = [
                job for job in cluster.jobs() if is_part(job) and (job["NodeList"], job["State"]) == ("n2", "RUNNING")
            ]
            return [job for job in jobs if any(path.parent.name in job["Comment"] for path in finished())]

        (victim,) = cluster.wait_for(at_work, 900, "job of a part on n2")
        before = finished()
        cluster.kill("n2")
        succeed(run, data)
        after = {job["JobID"]: job for job in cluster.jobs()}
        assert cluster.states()["n2"].startswith("down")
        again = after[victim["JobID"]]
        assert (again["RestartCnt"], again["NodeList"], again["State"]) == ("1", "n1", "COMPLETED")
        assert {job["State"] for job in after.values()} == {"COMPLETED"}
    assert before.items() <= finished().items(), "what was finished was made again"
    expected, found = kept(local), kept(data)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    print(f"\n{len(found)} of {len(expected)} artefacts equal")
    gathered_without_training(data)


def gathered_without_training(data):
    """Notebook 02 trained only what depends on a result, so the parts hold all the rest, and no file twice."""
    parts = [json.loads(path.read_text()) for path in (data / "runs/smoke/parts/02_train_dictionaries").glob("*.json")]
    made = [f"{part['hook']}/{name}.json" for part in parts for name in part["made"]]
    assert len(made) == len(set(made))
    folder = data / "runs/smoke/dictionaries"
    rest = {str(path.relative_to(folder)) for path in folder.glob("*/*.json")} - set(made)
    assert {name.split("/")[1].split("_")[0] for name in rest} == {"topk"} and len(rest) == 1


def seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def fan_out(local, data, place, nodes) -> float:
    """Seconds from the first start to the last end of the jobs of all parts of notebook 02, on so many nodes."""
    shutil.copytree(local / "runs", data / "runs", ignore=shutil.ignore_patterns("dictionaries", "baselines", "ioi"))
    place.mkdir()
    config = f"profile=smoke profiles={data.parent} fan_out=true threads=1"
    with slurm.cluster(place, ("n1", "n2")[:nodes]) as cluster:
        flags = f"FLAGS={FLAGS} --until {PART}"
        with make(data, *ON_SLURM, flags, f"CONFIG={config}", environment=cluster.environment) as run:
            succeed(run, data)
        jobs = [job for job in cluster.jobs() if is_part(job)]
    times = [(seconds(job["StartTime"]), seconds(job["EndTime"])) for job in jobs]
    lasted = [end - start for start, end in times]
    print(f"\n{nodes} nodes: {len(jobs)} jobs of {min(lasted):.0f} to {max(lasted):.0f} s")
    assert len(jobs) == 11 and min(lasted) > 20
    return max(end for _, end in times) - min(start for start, _ in times)


def test_two_nodes_are_faster_than_one(local, tmp_path):
    """Jobs of one thread on nodes of one CPU, so the second node is the machine's second core."""
    text = (ROOT / "notebooks/profiles/smoke.yaml").read_text()
    for old, new in STAND_IN.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "smoke.yaml").write_text(text)
    two, one = (fan_out(local, tmp_path / f"data{n}", tmp_path / f"slurm{n}", n) for n in (2, 1))
    print(f"{one:.0f} s on one node, {two:.0f} s on two: {one / two:.2f} times as fast")
    assert one / two >= 1.6


#: Longer jobs and more sites than smoke has.
STAND_IN = {
    "  other_hooks: [blocks.1.hook_resid_post]\n  mlp_hook: blocks.1.mlp.hook_post\n  alphas":
    "  other_hooks: [blocks.1.hook_resid_post, blocks.1.hook_mlp_out, blocks.1.attn.hook_z]\n"
    "  mlp_hook: blocks.1.mlp.hook_post\n  alphas",
    "ratios: [0.5, 1.0]\n  mlp_ratios: [0.125]\n  mlp_rows": "ratios: [0.5, 1.0, 4.0]\n  mlp_ratios: [2.0]\n  mlp_rows",
    "passes: 1\n03": "passes: 24\n03",
}  # fmt: skip
