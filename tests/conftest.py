"""Shared by the tests: small runs in this process or in one of their own, and a small corpus."""
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # for child processes
torch.set_num_threads(1)

import train  # noqa: E402
import train_lra  # noqa: E402
from data.tokenizers import load_tokenizer  # noqa: E402
from engine import options  # noqa: E402
from engine.device import Compute  # noqa: E402
from engine.options import DataError  # noqa: E402
from fake_runs import FAKE  # noqa: E402
from lra_archives import archive, cifar, imdb_files, retrieval_files  # noqa: E402

# test_gpu.py is for machines that have one.
GPU = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""
collect_ignore = [] if GPU else ["test_gpu.py"]

# A run measures the processor for 0.3 s before it trains. Here one product has to do.
Compute.matmul_peak.__defaults__ = (0.0,)

SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4",
         "--eval_iters=2", "--device=cpu"]
ARMS = {"off": ["--precond=False"], "on": ["--precond=True"]}
TIMING = {"elapsed_s", "tokens_per_s", "ms_per_step", "peak_memory_mb", "mfu"}
DATA_VARIABLES = ("TINYSHAKESPEARE", "TIKTOKEN_CACHE_DIR")  # they name data that some tests need
NO_NAMESPACES = "no right to make network namespaces here"  # root has it, in many containers not


def pytest_sessionfinish(session):
    """With CI=true in the environment a skipped test is a failure: its packages are there.

    What CI cannot install may be missing. A skip is excused where its reason names a variable of
    data that is not set, or the right to make network namespaces, which the system has refused.
    """
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return  # one of several processes of pytest -n: the first one reports for all
    skipped = reporter.stats.get("skipped", [])
    excuses = [name for name in DATA_VARIABLES if not os.environ.get(name)] + [NO_NAMESPACES]
    unexcused = [test for test in skipped
                 if not any(excuse in str(test.longrepr) for excuse in excuses)]
    if os.environ.get("CI") == "true" and unexcused and session.exitstatus == pytest.ExitCode.OK:
        print(f"\nCI=true, and {len(unexcused)} tests were skipped: that counts as a failure")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The options for a text of 6,000 characters, some of them not ASCII."""
    folder = tmp_path_factory.mktemp("corpus")
    line = ("Préconditioned attention {} divides each row of {} by its length;\n"
            "nothing else {} changes.\n")
    text = "".join(line.format(i * i % 97, chr(97 + i % 26), i % 13) for i in range(75))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return [f"--dataset={folder / 'text.txt'}", f"--data_dir={folder / 'data'}"]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """--data_dir for all runs: what one prepares the others find."""
    return f"--data_dir={tmp_path_factory.mktemp('lra')}"


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """{task: --source=archive} of the tasks that are read. Pairs of 5 to 40 random letters."""
    folder = tmp_path_factory.mktemp("released")
    random = np.random.default_rng(0)
    letters = [bytes(random.integers(97, 123, random.integers(5, 41)).tolist()) for _ in range(24)]
    pairs = [b"%d\t1\t2\t%b\t%b" % (i % 2, letters[2 * i], letters[2 * i + 1]) for i in range(12)]
    files = {"text": imdb_files(), "retrieval": retrieval_files(pairs), "image": cifar()[2]}
    return {task: f"--source={archive(folder / f'{task}.tar.gz', content)}"
            for task, content in files.items()}


@pytest.fixture(scope="session")
def gpt2():
    """Its tokenizer, where its vocabulary can be had."""
    try:
        return load_tokenizer({"name": "gpt2"})
    except DataError as error:
        pytest.skip(str(error))


def teach(module, *arguments):
    """Run a script's main in this process, once for several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()


@pytest.fixture(scope="session")
def lm(corpus, tmp_path_factory):
    """Label -> folders: two arms of two seeds of a language model."""
    base = tmp_path_factory.mktemp("lm")
    groups = {}
    for arm, arguments in ARMS.items():
        for seed in (1, 2):
            groups.setdefault(arm, []).append(base / f"{arm}-{seed}")
            teach(train, *SMALL, *corpus, *arguments, f"--seed={seed}", "--max_iters=6",
                  "--init=gpt2", "--eval_interval=2", "--log_interval=1", "--warmup_iters=2",
                  f"--out_dir={groups[arm][-1]}")
    return groups


@pytest.fixture(scope="session")
def lra(tmp_path_factory):
    """Label -> folders: two arms of one seed on ListOps.

    There is one head of 32 channels: some sequences have fewer tokens.
    """
    base = tmp_path_factory.mktemp("lra")
    groups = {arm: [base / arm] for arm in ARMS}
    for arm, arguments in ARMS.items():
        teach(train_lra, "listops", *SMALL, *arguments, "--n_head=1", "--block_size=60",
              "--max_length=60", "--n_train=40", "--n_val=8", "--n_test=4", "--max_iters=4",
              "--eval_interval=2", "--log_interval=1", f"--data_dir={base / 'data'}",
              f"--out_dir={base / arm}")
    return groups


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *arguments) runs a script's main as the command line would.

    -> (exit code, standard output, standard error)
    """
    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            options.run(module.main)
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err
    return run


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The runs of a comparison train nothing; fake("val_accuracy") changes what they record."""
    from study import launch  # here, as it needs scipy

    def record(metric):
        path = tmp_path / "fake.py"
        path.write_text(f"METRIC = {metric!r}\n" + FAKE)
        command = launch.Comparison.command
        if not hasattr(command, "faked"):
            def replaced(self, run):
                return [sys.executable, "-S", str(path), *command(self, run)[2:]]
            replaced.faked = True
            monkeypatch.setattr(launch.Comparison, "command", replaced)
    monkeypatch.setattr(launch, "POLL", 0.01)
    record("val_loss")
    return record


@pytest.fixture
def study(fake, call, tmp_path):
    """study(arguments) compares fake runs -> (what `call` returns, compare.json)."""
    import compare

    def run(*arguments, script="train.py"):
        result = call(compare, script, "--max_iters=6", "--precond=True",
                      f"--out_dir={tmp_path / 'out'}", *arguments)
        path = tmp_path / "out/compare.json"
        return result, json.loads(path.read_text()) if path.exists() else None
    return run


def error(result) -> str:
    """The one line that a user's mistake ends in."""
    code, _, err = result
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and ".py: error: " in lines[0], result
    return lines[0]


def shell(*command, check=True, timeout=300, **env) -> subprocess.CompletedProcess:
    """Run this Python in the project's root with the words of a command: a script, its options."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | env, timeout=timeout)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(processes: int, *command, **kwargs) -> subprocess.CompletedProcess:
    return shell("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                 *command, **kwargs)


def launch(processes: int, *command, **kwargs) -> subprocess.CompletedProcess:
    if processes == 1:
        return shell(*command, **kwargs)
    return torchrun(processes, *command, **kwargs)


def killer(folder: Path, script: str, step: int) -> Path:
    """A program that runs `script`'s main and kills itself (SIGKILL) just before `step`.

    Of several processes the last one does.
    """
    path = folder / "killer.py"
    path.write_text(textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        import {script}
        from engine import trainer
        train_step = trainer.Trainer.train_step
        def killing(self):
            if self.step == {step} and self.compute.rank == self.compute.world - 1:
                os.kill(os.getpid(), 9)
            train_step(self)
        trainer.Trainer.train_step = killing
        if __name__ == "__main__":
            {script}.main()
    """))
    return path


def patched(folder: Path, patch: str) -> Path:
    """A program that runs train.py after the lines `patch`, which know `rank` and `Trainer`."""
    program = folder / "program.py"
    program.write_text(textwrap.dedent(f"""
        import os, signal, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import train
        from engine import options
        from engine.trainer import Trainer
        rank = os.environ["RANK"]
    """) + textwrap.dedent(patch) + "options.run(train.main)\n")
    return program


def messages(folder: Path, patch: str, *options, processes: int = 2) -> list[str]:
    """Run train.py under torchrun after the lines `patch`.

    -> what each rank's UserError says, "" where it had none.
    """
    program = folder / "messages.py"
    program.write_text(textwrap.dedent(f"""
        import os, pathlib, sys
        sys.path.insert(0, {str(ROOT)!r})
        import train
        from engine import options, run, trainer
        rank = os.environ["RANK"]
    """) + textwrap.dedent(patch) + textwrap.dedent(f"""
        error = ""
        try:
            train.main()
        except options.UserError as e:
            # Kept, with the model: freeing it waits, with the GIL, for gloo's threads, which may
            # want the GIL.
            error = e
        pathlib.Path({str(folder)!r}, f"message{{rank}}").write_text(str(error))
        os._exit(0)
    """))
    torchrun(processes, program, *options)
    return [(folder / f"message{rank}").read_text() for rank in range(processes)]


def read_metrics(folder) -> list[dict]:
    """The records of a run, without what measures time or memory."""
    records = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.append({name: record[name] for name in record.keys() - TIMING})
    return records
