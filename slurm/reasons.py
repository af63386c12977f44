"""Slurm's words for why a job waits or has ended, in plain ones."""

import re

# Job reason codes of squeue's manual page; the first that fits counts.
_REASONS: tuple[tuple[str, str], ...] = (
    ("DependencyNeverSatisfied", "predecessor failed"),
    ("Dependency", "waits for its predecessor"),
    ("Priority", "jobs of higher priority are ahead"),
    ("Resources", "waits for free nodes"),
    ("JobHeldUser", "held by its owner; `scontrol release {id}` lets it start"),
    ("JobHeldAdmin", "held by an operator; ask the site"),
    ("BeginTime", "may not begin yet; after a requeue Slurm waits about two minutes"),
    ("JobArrayTaskLimit", "waits for the array's throttle"),
    ("QOSMaxWallDuration|AssocMaxWallDuration|PartitionTimeLimit", "walltime above the limit: "
     "cancel, and submit with a smaller cluster.hours"),
    ("QOSMaxNode|AssocMaxNode|PartitionNodeLimit|QOSMinGRES|QOSMinCpu", "nodes or cores outside "
     "the limits of QoS or partition"),
    ("(QOS|Assoc)Grp.*(Minutes|RunMinutes|Billing)", "the account's hours are used up or reserved"),
    ("(QOS|Assoc)(Grp|Max).*(Job|Submit|CPU|Cpu|GRES|Gres|Node|Memory|Jobs)", "as much "
     "runs already as QoS or account allow at once"),
    ("QOS|Assoc|InvalidQOS|InvalidAccount", "a limit of QoS or account"),
    ("ReqNodeNotAvail|NodeDown|Reserved|Maint", "nodes are down, drained or reserved"),
    ("PartitionDown|PartitionInactive", "the partition does not start jobs now"),
    ("Reservation", "waits for its reservation"),
    ("JobHoldMaxRequeue|launch_failed_requeued_held|launch failed requeued held",
     "failed to start several times and is held; `scontrol release {id}` tries again"),
    # The second half is Slurm 22.05 with exclusive jobs; neither a release nor the nodes help.
    ("BadConstraints", "no node has what it asks for; or, where it has run before, all its nodes "
     "died at once: then `scancel {id}`, and the next segment goes on"),
    ("Licenses|BurstBuffer", "waits for a resource of the site"),
    ("NonZeroExitCode", "ended with an error"),
    ("TimeLimit", "ran out of walltime"),
    ("OutOfMemory", "ran out of memory"),
    ("NodeFail", "a node failed"),
    ("RaisedSignal", "was killed"),
    ("Cleaning", "a start before is still being cleaned up"),
    ("SystemFailure|JobLaunchFailure", "Slurm could not start it"),
)  # fmt: skip


def in_words(reason: str, job_id: str = "") -> str:
    """`Priority: jobs of higher priority are ahead`; an unknown word stands alone."""
    word = reason.strip()
    if not word or word == "None":
        return ""
    for pattern, words in _REASONS:
        if re.match(pattern, word):
            return f"{word}: {words.format(id=job_id)}"
    return word


def failed_before(reason: str) -> bool:
    """Whether a job never began because what it depends on failed."""
    return reason.startswith("DependencyNeverSatisfied")
