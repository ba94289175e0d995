"""Two hosts on one machine: network namespaces with a cable, and the lines of docs/clusters.md."""
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import NO_NAMESPACES, ROOT, SMALL, read_metrics, shell
from engine import checkpoint
from test_docs import commands

pytestmark = pytest.mark.slow
RUN = [*SMALL, "--max_iters=80", "--eval_interval=5"]
LOST = "train.py: error: process {} has lost touch with another one"
PATIENCE = 120  # seconds for what takes a few on a machine that does nothing else


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


@dataclass
class Host:
    """A network namespace with an interface eth0, and a name for the processes that want one."""
    name: str
    space: str
    names: Path  # /etc/hosts, for processes that know the hosts' names

    def start(self, words: list[str], named: bool, said: Path) -> subprocess.Popen:
        """Run a command on this host; what it says goes to the file `said`."""
        inside = ["nsenter", f"--net=/run/netns/{self.space}"]
        if named:
            inside += ["unshare", "--uts", "--mount", "sh", "-c",
                       'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"',
                       self.name, str(self.names)]
        with said.open("w") as file:
            return subprocess.Popen([*inside, "env", *words], cwd=ROOT, stdout=file, stderr=file)

    def processes(self) -> list[int]:
        return [int(number) for number in ip("netns", "pids", self.space).split()]

    def kill(self, all_but: int = 0):
        for number in set(self.processes()) - {all_but}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def plug(self, how: str):
        """The cable's end, "up" or "down"."""
        ip("-n", self.space, "link", "set", "eth0", how)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """node0 and node1, at 10.0.0.1 and 10.0.0.2, joined by a cable."""
    for program, package in ("ip", "iproute2"), ("nsenter", "util-linux"):
        if not shutil.which(program):
            pytest.skip(f"no command {program}: install {package}, on Linux")
    names = tmp_path_factory.mktemp("hosts") / "hosts"
    names.write_text("127.0.0.1 localhost\n10.0.0.1 node0\n10.0.0.2 node1\n")
    both = [Host(f"node{i}", f"precond-{os.getpid()}-{i}", names) for i in range(2)]
    a, b = (host.space for host in both)
    try:
        try:
            ip("netns", "add", a)
            ip("netns", "add", b)
            ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "eth0", "netns", b)
        except subprocess.CalledProcessError as e:
            if not any(words in e.stderr for words in ("not permitted", "denied", "not supported")):
                raise
            pytest.skip(f"{NO_NAMESPACES}: {e.stderr.strip()}")
        for i, host in enumerate(both):
            ip("-n", host.space, "addr", "add", f"10.0.0.{i + 1}/24", "dev", "eth0")
            ip("-n", host.space, "link", "set", "lo", "up")
            host.plug("up")
        yield both
    finally:
        for host in both:
            if (Path("/run/netns") / host.space).exists():
                host.kill()
                ip("netns", "delete", host.space)  # with its end of the cable


def written(text: str) -> list[list[str]]:
    """The words of a document's commands for several machines, up to train.py, for one process."""
    text = re.sub(r"nproc_per_node=\w+", "nproc_per_node=1", text)
    text = text.replace("torchrun", shlex.join([sys.executable, "-m", "torch.distributed.run"]))
    found = [shlex.split(line) for line in commands(text) if "--rdzv_endpoint" in line]
    return [words[:words.index("train.py") + 1] for words in found]


def by_slurm(folder: Path) -> str:
    """The command that config/slurm.sbatch has each machine run, its environment before it."""
    (folder / "scontrol").write_text("#!/bin/sh\nprintf 'node0\\nnode1\\n'\n")
    (folder / "srun").write_text("#!/bin/sh\nshift\n"
                                 "echo $(env | grep ^TORCH_DISABLE) \"$@\"\n")
    for name in "scontrol", "srun":
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[0-1]",
           "SLURM_NNODES": "2", "SLURM_JOB_ID": "123456"}
    done = subprocess.run(["bash", "config/slurm.sbatch"], cwd=ROOT, env=os.environ | env,
                          capture_output=True, text=True, check=True)
    return done.stdout


@contextlib.contextmanager
def launched(hosts: list[Host], by: str, folder: Path, *options):
    """A context with torchrun on each host as the document says: [(process, what it says), ...].

    by: "name" or "address", how the hosts find each other, or "slurm", which starts them by name.
    Each has one process, and data apart.
    """
    name, *address = written((ROOT / "docs" / "clusters.md").read_text(encoding="utf-8"))
    if by == "slurm":
        name, = written(f"```sh\n{by_slurm(folder)}```\n")
    runs = []
    try:
        for host, words in zip(hosts, address if by == "address" else [name, name], strict=True):
            said = folder / f"{host.name} by {by}"
            command = [*words, *options, f"--data_dir={folder / host.name}"]
            runs.append((host.start(command, by != "address", said), said))
        yield runs
    finally:
        for host in hosts:
            host.kill()
        for run, _ in runs:
            run.wait()


def await_words(said: Path, words: str):
    """Return as soon as the file has `words`."""
    end = time.monotonic() + PATIENCE
    while words not in said.read_text():
        assert time.monotonic() < end, said.read_text()
        time.sleep(0.02)


def await_end_of_workers(host: Host):
    end = time.monotonic() + PATIENCE
    while len(host.processes()) > 1:  # torchrun alone is left, or nothing
        assert time.monotonic() < end
        time.sleep(0.02)


def end_well(runs):
    for run, said in runs:
        assert run.wait(PATIENCE) == 0, said.read_text()


@pytest.fixture(scope="module")
def undisturbed(hosts, corpus, tmp_path_factory):
    """The folder of a whole run on two hosts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with launched(hosts, "name", folder, *RUN, *corpus, f"--out_dir={folder}") as runs:
        end_well(runs)
    return folder


def test_two_hosts_train_as_one_process_does(undisturbed, corpus, tmp_path):
    shell("train.py", *RUN, *corpus, f"--out_dir={tmp_path}")
    for a, b in zip(read_metrics(tmp_path), read_metrics(undisturbed), strict=True):
        assert a["step"] == b["step"] and a.get("tokens") == b.get("tokens")
        for name in {"train_loss", "val_loss", "grad_norm"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)


def test_a_run_goes_on_without_a_worker_and_without_a_host(hosts, undisturbed, corpus, tmp_path):
    run = [*RUN, *corpus, f"--out_dir={tmp_path}"]
    with launched(hosts, "slurm", tmp_path, *run, "--init_from=auto") as runs:
        (_, first), (other, second) = runs
        await_words(first, "\nstep 10: ")
        hosts[1].kill(all_but=other.pid)
        await_words(first, " of 80\n")  # started again by torchrun
        await_words(first, "\nstep 30: ")
        hosts[0].kill()  # where all meet, with the process that saves
        await_words(second, LOST.format(1))
        assert other.wait(PATIENCE) == 1
    assert 5 <= checkpoint.read(tmp_path / "ckpt.pt")["step"] < 80
    with launched(hosts, "address", tmp_path, *run, "--init_from=resume") as runs:
        end_well(runs)
    assert read_metrics(tmp_path) == read_metrics(undisturbed)


def test_a_cable_that_is_gone_ends_the_run_in_a_line(hosts, corpus, tmp_path):
    with launched(hosts, "name", tmp_path, *RUN, *corpus, "--timeout=10",
                  f"--out_dir={tmp_path}") as runs:
        (first, said), (second, said_too) = runs
        await_words(said, "\nstep 10: ")
        hosts[0].plug("down")
        start = time.monotonic()
        await_words(said, LOST.format(0))
        await_words(said_too, LOST.format(1))
        assert 8 < time.monotonic() - start < PATIENCE
        assert "was silent for --timeout=10 seconds" in said.read_text()
        await_end_of_workers(hosts[1])
        assert first.wait(PATIENCE) == 1
        assert second.poll() is None  # it waits for the other torchrun until the system gives up
    hosts[0].plug("up")
    assert 5 <= checkpoint.read(tmp_path / "ckpt.pt")["step"] < 80
