"""Ray nodes on this machine, each a `ray start` of its own: a test may submit jobs to them, and kill them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parent.parent
# `python` in an entrypoint is the one first on the head node's PATH, as in an activated environment.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ENVIRONMENT = {
    **os.environ, "PATH": PATH, "RAY_ADDRESS": "", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # of 15 otherwise: on a busy machine workers would hardly start at all
}  # fmt: skip
RAY = str(Path(sys.executable).parent / "ray")


class Cluster:
    """A head node with a dashboard, and worker nodes that come and go."""

    def __init__(self, folder: Path, head_cpus: int, head_gpus: int) -> None:
        self._folder, self._port, self._dashboard = folder, free_port(), free_port()
        self.address, self.dashboard = f"127.0.0.1:{self._port}", f"http://127.0.0.1:{self._dashboard}"
        self.head = self._start(
            f"--num-cpus={head_cpus}", f"--num-gpus={head_gpus}",
            "--head", f"--port={self._port}", f"--dashboard-port={self._dashboard}",
            "--include-dashboard=true", f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}",
        )  # fmt: skip
        self.workers: list[subprocess.Popen[bytes]] = []
        self._added = 0
        self._wait_until_up()

    def _start(self, *flags: str) -> subprocess.Popen[bytes]:
        common = ("--block", "--object-store-memory=200000000", "--disable-usage-stats")
        own = f"--dashboard-agent-listen-port={free_port()}"
        return subprocess.Popen([RAY, "start", *common, own, *flags], env=ENVIRONMENT, stdout=subprocess.DEVNULL)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=5).read()
                return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def add_worker(self, cpus: int) -> None:
        """Add a node with a folder of its own, as a machine has: a node that comes up unpacks the working directory
        of a job anew, and would take it away from the workers of another one in the same folder."""
        self._added += 1
        folder = f"--temp-dir={self._folder / f'w{self._added}'}"
        self.workers.append(self._start(f"--num-cpus={cpus}", f"--address={self.address}", folder))

    def kill_worker(self) -> int:
        """SIGKILL everything of the oldest worker node at once, as when its machine loses power; returns how many
        processes that were."""
        node = self.workers.pop(0)
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in processes:
            kill(process)
        node.wait(timeout=30)
        return len(processes)

    def actors(self) -> list[psutil.Process]:
        """Caption actors of all nodes."""
        return self.processes("ray::MapWorker")

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of all nodes whose command line holds ``title``."""
        found = []
        for node in (self.head, *self.workers):
            for process in psutil.Process(node.pid).children(recursive=True):
                try:
                    if title in " ".join(process.cmdline()):
                        found.append(process)
                except psutil.NoSuchProcess:
                    continue
        return found

    def stop(self) -> None:
        for node in (*self.workers, self.head):
            node.terminate()
        for node in (*self.workers, self.head):
            node.wait(timeout=60)

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``ray job …`` against this cluster."""
        command = [RAY, "job", arguments[0], "--address", self.dashboard, *arguments[1:]]
        return subprocess.run(command, capture_output=True, text=True, timeout=280, env=ENVIRONMENT)


@contextmanager
def started_cluster(head_cpus: int, head_gpus: int = 0) -> Iterator[Cluster]:
    """A cluster that is stopped by ending the processes that it started; Ray takes its GPUs on trust."""
    folder = Path(tempfile.mkdtemp(prefix="fc-", dir="/tmp"))  # Ray's socket paths may not be long
    cluster = Cluster(folder, head_cpus, head_gpus)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill(process: psutil.Process) -> None:
    """SIGKILL; one that is already gone is fine."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def checkout(folder: Path) -> Path:
    """The library and its jobs as a fresh checkout would have them; a working directory to submit."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("framecap", "jobs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
    return folder
