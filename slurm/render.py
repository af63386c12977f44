"""A batch script from a Job: the only place that writes one.

`#SBATCH` lines come from submitit, site rules from `conf/cluster`, the rest is a body made by
`chain.py` or `arrays.py` out of `rank_command` and `single_command`.  Nothing of this needs Slurm.
"""

import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm.job import LOG, Job
from slurm.local import OFFLINE

COMMENT = "amalia-vl:"
MOST_SIGNAL_SECONDS = 65535  # of sbatch --signal
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

# What a rank knows of its place, from the variables that Slurm sets in each task.
_RANK = (
    "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
    "LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE%%[!0-9]*}; "
)
_EXEC = 'exec "$@"'
# A rank that was asked to stop has not failed: else srun would end its peers in the midst of their
# saving, and, as it returns the highest code of all ranks, hide one that has failed.
_STOPPING = (
    'trap : TERM INT USR1 USR2; "$@"; code=$?; '
    "case $code in 130 | 138 | 140 | 143) exit 0 ;; esac; exit $code"
)


def script(
    job: Job,
    config: Config,
    code: Path,
    dependency: str = "",
    exclude: Sequence[str] = (),
    directory: Path | None = None,
) -> str:
    """Text of the batch script of `job`.

    Args:
        code: the run's snapshot, RUN/code, which the job runs.
        dependency: Slurm's words with job ids; empty before they are known.
        exclude: nodes to avoid, besides `cluster.exclude`.
        directory: where the job's relative paths begin; here by default.

    Raises ConfigError where a value cannot stand in a script.
    """
    cluster = config.cluster
    site = cluster.site
    cwd = Path.cwd() if directory is None else directory
    options: dict[str, Any] = {
        "output": _pattern(job),
        "open-mode": "append",
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        "chdir": str(cwd),
    }
    if job.elements is not None:
        most = min(job.throttle or job.elements, job.elements)
        options["array"] = f"0-{job.elements - 1}%{most}"
    if cluster.reservation is not None:
        options["reservation"] = cluster.reservation
    options |= {key: True if value == "true" else value for key, value in site.sbatch.items()}
    nodes = ",".join(dict.fromkeys([*cluster.exclude, *exclude]))
    given = {
        "job_name": job.name,
        "time": math.ceil(job.hours * 60 - 1e-6),
        "nodes": job.nodes,
        "ntasks_per_node": job.ranks_per_node,
        "cpus_per_task": job.cpus_per_rank,
        "account": cluster.account,
        "qos": cluster.qos_of(job.nodes),
        "partition": cluster.partition,
        "exclusive": job.exclusive or None,
        "exclude": nodes or None,
        "dependency": dependency or None,
        "comment": comment(code.parent),
        "mem": _memory(job, config),
        "signal_delay_s": min(max(job.signal_seconds, 1), MOST_SIGNAL_SECONDS),
        **_gpus(job, config),
    }
    _refuse_control({**given, **options, "code": code, "cwd": cwd})
    text: str = _make_sbatch_string(
        command=job.body.rstrip("\n"),
        folder=job.directory,
        use_srun=False,
        wckey=None,  # type: ignore[arg-type]  # submitit's way to leave it out
        stderr_to_stdout=True,
        setup=_setup(job, config, code),
        additional_parameters=options,
        **given,
    )
    if site.login_shell:
        text = text.replace("#!/bin/bash\n", "#!/bin/bash -l\n", 1)
    return text.rstrip("\n") + "\n"


def comment(run: Path) -> str:
    """Slurm comment by which every job of a run is known, whoever lost its id."""
    return COMMENT + os.path.abspath(run)


def python(config: Config) -> str:
    """Interpreter of the jobs; not resolved, for a virtual environment's is a link."""
    here = "python3" if config.cluster.site.container else sys.executable
    return config.cluster.python or here


def rank_command(
    config: Config, module_and_arguments: Sequence[str], may_stop: bool = False
) -> str:
    """The srun line that starts `python -m MODULE ARGUMENTS` once a rank.

    It returns the highest exit code. With `may_stop` a rank that ends by SIGTERM, SIGINT, SIGUSR1
    or SIGUSR2, or with 128 + one of them, counts as 0.
    """
    cluster, ranks = config.cluster, config.parallel.world_size
    nodes, ranks_per_node, cpus = shape(config)
    words = ["srun", f"--nodes={nodes}", f"--ntasks={ranks}"]
    if ranks == nodes * ranks_per_node:  # else Slurm spreads them, and would warn
        words.append(f"--ntasks-per-node={ranks_per_node}")
    if cpus is not None:  # not inherited from the job by every version of Slurm
        words.append(f"--cpus-per-task={cpus}")
    words += ["--kill-on-bad-exit=1", "--unbuffered", "--label", *cluster.site.srun]
    each = _RANK + (_STOPPING if may_stop else _EXEC)
    inside = f"{_container(config)}{shlex.join([python(config), '-m', *module_and_arguments])}"
    return f"{shlex.join(words)} \\\n    bash -c {shlex.quote(each)} rank \\\n    {inside}"


def single_command(config: Config, words: Sequence[str]) -> str:
    """`python -m WORDS` as one process, on the node where the script runs."""
    return f"{_container(config)}{shlex.join([python(config), '-m', *words])}"


def shape(config: Config) -> tuple[int, int, int | None]:
    """Nodes, ranks on each, and cores of each rank (None: not known)."""
    cluster, ranks = config.cluster, config.parallel.world_size
    nodes = cluster.nodes(ranks)
    ranks_per_node = -(-ranks // nodes)
    if cluster.cpus_per_node is None:
        return nodes, ranks_per_node, None
    sharing = ranks_per_node if cluster.exclusive else cluster.ranks_on_a_node
    return nodes, ranks_per_node, max(1, cluster.cpus_per_node // sharing)


def _container(config: Config) -> str:
    # Shell words as the site wrote them: they may hold variables.
    return f"{config.cluster.site.container} " if config.cluster.site.container else ""


def _pattern(job: Job) -> str:
    """Path of the log; `%` is Slurm's sign for a pattern."""
    directory = str(job.directory).replace("%", "%%")
    return f"{directory}/{'log_%a.out' if job.elements is not None else LOG}"


def _gpus(job: Job, config: Config) -> dict[str, Any]:
    flag, gpus = config.cluster.site.gpu_flag, job.gpus_per_node
    if not gpus or flag == "none":
        return {}
    return {"gres": f"gpu:{gpus}"} if flag == "gres" else {"gpus_per_node": gpus}


def _memory(job: Job, config: Config) -> str | None:
    """All of a node's memory for a job that has the node, else its share by cores or GPUs."""
    cluster = config.cluster
    if not cluster.site.memory_flag:
        return None
    if job.exclusive:
        return "0"  # all of it; without a word Slurm may give some default for each core
    if cluster.memory_gb is None:
        return None
    cpus = (job.cpus_per_rank or 0) * job.ranks_per_node
    shares = [
        asked / of
        for asked, of in ((cpus, cluster.cpus_per_node), (job.gpus_per_node, cluster.gpus_per_node))
        if asked and of
    ]
    return f"{max(1, int(cluster.memory_gb * min(1.0, max(shares))))}G" if shares else None


def _setup(job: Job, config: Config, code: Path) -> list[str]:
    cluster = config.cluster
    threads = str(cluster.threads_per_rank)
    variables: dict[str, str] = {
        # The job runs the run's own copy of the code, whatever the working tree has become.
        "PYTHONPATH": str(code),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        **OFFLINE,
    }
    if cluster.gpus_per_node:
        # Megatron's overlap of tensor-parallel communication needs one hardware queue.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    stage = f", {job.stage}" if job.stage else ""
    lines = [f"# {job.kind} {job.number} of {code.parent}{stage}"]
    lines += [f"# begins when {name} has ended, however" for name in job.after_any]
    lines += [f"# begins when {name} has succeeded" for name in job.after_ok]
    lines += cluster.site.setup
    lines += ["unset PYTHONHOME  # set by some modules for another Python"]
    lines += _exports(variables) + _exports(cluster.site.environment)
    return lines


def _exports(variables: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _refuse_control(values: Mapping[str, Any]) -> None:
    """A line break in a value would become a line of the script."""
    for name, value in values.items():
        if _CONTROL.search(str(value)):
            raise ConfigError(
                f"{name}={str(value)!r} holds a line break or control character, which cannot "
                "stand in a batch script; change it"
            )
