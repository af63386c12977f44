"""What Slurm's programs complain of, with the remedy."""

import re

from conf.schema.errors import ConfigError

# What the programs say -> what has gone wrong, and what to do. The first that fits counts.
_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"accounting storage is disabled|slurm_persist_conn|database|slurmdbd",
        "accounting",
        "this Slurm keeps no accounting records, or its database is down",
    ),
    (
        r"munge|Protocol authentication error|auth_g_create",
        "munge",
        "munge does not run on this machine; try another login node, or tell the operators",
    ),
    (
        r"Unable to contact slurm controller|Connection (refused|timed out)|Socket timed out"
        r"|Zero Bytes|Unable to establish",
        "unreachable",
        "Slurm's controller does not answer; wait a minute and give the same command",
    ),
    (
        r"Unable to process configuration file|cannot stat file|configuration source",
        "configuration",
        "this machine has Slurm's programs but no cluster; use a login node, or set SLURM_CONF",
    ),
    (r"Invalid account", "account", "give an account that is yours in SLURM_ACCOUNT"),
    (r"Invalid qos", "qos", "give a QoS that your account may use in SLURM_QOS"),
    (
        r"[Ii]nvalid partition|partition .*not available",
        "partition",
        "set cluster.partition to one that `sinfo` lists",
    ),
    (
        r"violates accounting/QOS policy|QOS\w*(Max|Limit)|Assoc\w*(Max|Limit)|limit",
        "limits",
        "ask for less (nodes, hours, jobs), or for another QoS in SLURM_QOS",
    ),
    (
        r"[Pp]ermission denied|Access.denied|not permitted|[Uu]ser.*not allowed",
        "denied",
        "the job belongs to somebody else, or the site forbids this program",
    ),
    (
        r"Requested node configuration is not available|More processors requested",
        "shape",
        "no node has what a job asks for; compare cluster.* with `sinfo`",
    ),
    (r"Invalid job id", "job", "Slurm has forgotten this job"),
)


class SlurmError(ConfigError):
    """A Slurm program that failed; `cause` is one word (missing, unreachable, munge, ...)."""

    def __init__(self, message: str, cause: str = "other") -> None:
        super().__init__(message)
        self.cause = cause


def failure(program: str, said: str) -> SlurmError:
    line = one_line(said) or "it failed without a word"
    for pattern, cause, remedy in _CAUSES:
        if re.search(pattern, said):
            return SlurmError(f"{program}: {line}; {remedy}", cause)
    return SlurmError(f"{program}: {line}")


def one_line(said: str) -> str:
    """The program's own words, prefixes off; what it says several times once."""
    lines = [
        re.sub(r"^\w+: (error|fatal|warning): ", "", line.strip()) for line in said.splitlines()
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line))[:500]
