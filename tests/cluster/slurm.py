"""A real SLURM on one machine: one controller and nodes of one CPU each on loopback, in a folder of its own.

`python tests/cluster/slurm.py COMMAND ...` runs a command with such a cluster and takes it down again.
Wants Debian's packages slurm-wlm and munge. Nothing outside of the folder is read or changed.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

SBIN = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
#: Plugins that need no control groups; a node that is silent for twenty seconds counts as dead.
CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmdTimeout=20
MessageTimeout=60
ReturnToService=2
MinJobAge=3600
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=32000\n"


def missing() -> list[str]:
    """Programs that the cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]


class Cluster:
    """A running cluster. `environment` is what its commands (sbatch, squeue, ...) need."""

    def __init__(self, folder: Path, names: tuple[str, ...]):
        self.folder, self.names, self.daemons = folder, names, {}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}:{SBIN}"}

    def call(self, *command: str) -> str:
        """Output of a SLURM command."""
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def start(self, name: str, *command: str, **options) -> None:
        with open(self.folder / f"{name}.out", "w") as log:
            self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, **options)

    def kill(self, name: str) -> None:
        """What a power failure does: the node's daemon, its job steps and all that they run are gone at once.

        Each node is a process-id namespace; the system kills all of it with its first process.
        """
        os.killpg(self.daemons[name].pid, signal.SIGKILL)
        self.daemons.pop(name).wait()

    def wait_for(self, done, seconds: float, what: str):
        """Call `done` until it returns something true, and return that."""
        deadline = time.monotonic() + seconds
        while not (result := done()):
            if time.monotonic() > deadline:
                logs = [f"--- {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log")]
                raise TimeoutError(f"no {what} within {seconds:.0f} s\n" + "\n".join(logs))
            time.sleep(0.2)
        return result

    def states(self) -> dict[str, str]:
        """State of each node, `idle`, `allocated`, `down*`, ..."""
        return dict(line.split() for line in self.call("sinfo", "-hN", "-o", "%N %T").splitlines())

    def jobs(self) -> list[dict]:
        """All jobs, also finished ones, as SLURM tells them; the comment holds the rule's name."""
        columns = ["JobID", "State", "NodeList", "Comment", "StartTime", "EndTime", "RestartCnt"]
        form = ",".join(f"{column}:|" for column in columns)
        lines = self.call("squeue", "-h", "--states=all", "-O", form).splitlines()
        return [dict(zip(columns, line.split("|"), strict=False)) for line in lines]


@contextmanager
def cluster(folder: Path, names: tuple[str, ...] = ("n1", "n2")):
    """Start the daemons in `folder`, yield the `Cluster` when all nodes are idle, and kill everything at the end."""
    host, user = socket.gethostname().split(".")[0], subprocess.check_output(["id", "-un"], text=True).strip()
    with ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in ("controller", *names)]
        ports = [one.getsockname()[1] for one in free]
    made = Cluster(folder, names)
    text = CONFIGURATION.format(host=host, user=user, folder=folder, port=ports[0])
    text += "".join(NODE.format(name=name, host=host, port=port) for name, port in zip(names, ports[1:], strict=True))
    text += f"PartitionName=all Nodes={','.join(names)} Default=YES MaxTime=INFINITE\n"
    (folder / "slurm.conf").write_text(text)
    # the executor plugin takes SLURM_CONF away from its job steps
    (folder / "srun").write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    (folder / "srun").chmod(0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
    # a user without rights gets the namespace by way of a user namespace, in which it stays who it is
    apart = ["--pid", "--fork", "--kill-child", "--mount-proc", *(["--map-current-user"] if os.geteuid() else [])]
    try:
        made.start("munged", "munged", "--foreground", "--force", *munge)
        made.wait_for((folder / "munge.socket").exists, 10, "munged")
        made.start("slurmctld", "slurmctld", "-D")
        for name in names:
            made.start(name, "unshare", *apart, "slurmd", "-D", "-N", name, start_new_session=True)
        idle = dict.fromkeys(names, "idle")
        ping = {"args": ["scontrol", "ping"], "env": made.environment, "stdout": subprocess.DEVNULL}
        made.wait_for(lambda: subprocess.call(**ping) == 0, 30, "controller")
        made.wait_for(lambda: made.states() == idle, 60, "idle nodes")
        yield made
    finally:
        for name in list(made.daemons)[::-1]:
            if name in names:
                made.kill(name)
            else:
                made.daemons[name].kill()
                made.daemons.pop(name).wait()


if __name__ == "__main__":
    if lacking := missing():
        sys.exit(f"error: {', '.join(lacking)} not found: install the packages slurm-wlm and munge")
    with tempfile.TemporaryDirectory() as place, cluster(Path(place)) as running:
        sys.exit(subprocess.call(sys.argv[1:], env=running.environment))
