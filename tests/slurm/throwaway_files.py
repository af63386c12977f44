"""The files of a throw-away Slurm: slurm.conf, gres.conf, slurmdbd.conf, hosts.

Slurm 22.05 (Debian 12) and later. Neither systemd nor cgroups are needed: linuxproc tracks
processes, config_overrides lets a small machine pretend to be large nodes, and a "GPU" is any
character device.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from slurm.bodies import FIRST_PORT, PORT_BLOCKS

CLUSTER_NAME = "throwaway"
ACCOUNT, OTHER_ACCOUNT = "ehpc01", "ehpc02"
GPUS = 4
CPU_CORES, ACC_CORES = 8, 80
_FAKE_GPUS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")


def free_ports(count: int) -> list[int]:
    """Neighbouring free TCP ports.

    Below those that the kernel gives to outgoing connections, and below those at which jobs let
    their ranks meet (`slurm.bodies`): all nodes are this one machine.
    """
    for _ in range(200):
        base = random.randrange(10_000, FIRST_PORT - count)
        sockets: list[socket.socket] = []
        try:
            for port in range(base, base + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
        return list(range(base, base + count))
    raise OSError(f"no {count} neighbouring free ports on this machine")


def first_job_id(worker: str) -> int:
    """A random id whose ports no other worker of pytest-xdist will come near soon.

    Ranks meet at a port made of the job's id modulo PORT_BLOCKS; here every node of every cluster
    is the same machine, and ranks of two jobs must not meet.
    """
    share = PORT_BLOCKS // 3
    slot = int(worker[2:]) % 3 if worker[2:].isdigit() else 2
    return PORT_BLOCKS * random.randrange(1, 40) + share * slot + random.randrange(share // 4)


def slurm_conf(
    directory: Path,
    user: str,
    controller_port: int,
    node_ports: Mapping[str, int],
    database_port: int | None,
    options: Mapping[str, str],
) -> str:
    """Text of slurm.conf; `options` replace or add keys."""
    keys = {
        "ClusterName": CLUSTER_NAME,
        "SlurmctldHost": f"{socket.gethostname()}(127.0.0.1)",
        "SlurmctldPort": str(controller_port),
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job waits for its old credential to expire, 120 s by default; 5 is
        # the least.
        "AuthInfo": f"socket={directory}/run/munge.sock,cred_expire=5",
        "SlurmctldPidFile": f"{directory}/run/slurmctld.pid",
        "SlurmdPidFile": f"{directory}/run/slurmd.%n.pid",
        "StateSaveLocation": f"{directory}/state",
        "SlurmdSpoolDir": f"{directory}/spool/%n",
        "SlurmctldLogFile": f"{directory}/log/slurmctld.log",
        "SlurmdLogFile": f"{directory}/log/slurmd.%n.log",
        "SlurmctldDebug": "info",
        "SlurmdDebug": "info",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "sched_interval=2,bf_interval=1,batch_sched_delay=0,"
        "sched_min_interval=0,defer_batch=0",
        "GresTypes": "gpu",
        "SlurmdParameters": "config_overrides",
        "JobAcctGatherType": "jobacct_gather/linux",
        "JobAcctGatherFrequency": "5",
        "JobRequeue": "1",
        "KillWait": "5",
        "UnkillableStepTimeout": "30",
        "MinJobAge": "3600",  # ended jobs stay visible to squeue -t all and scontrol
        "InactiveLimit": "0",
        "SlurmctldTimeout": "10",
        # With both a killed node is noticed after some 15 s.
        "SlurmdTimeout": "8",
        "MessageTimeout": "5",
        "ReturnToService": "2",
        "MaxArraySize": "1001",
        # Two clusters, or the same one started anew, do not share job ids (and so file names,
        # ports and stale results).
        "FirstJobId": str(first_job_id(os.environ.get("PYTEST_XDIST_WORKER", ""))),
        "SlurmctldParameters": "preempt_send_user_signal",
        "AccountingStorageType": "accounting_storage/none",
    }
    if database_port is not None:
        keys |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": str(database_port),
            # Without it every sacctmgr looks for the machine's own munge and hangs.
            "AccountingStoragePass": f"{directory}/run/munge.sock",
            "AccountingStorageTRES": "gres/gpu",
            "AccountingStorageEnforce": "associations,limits,qos",
            "AccountingStoreFlags": "job_comment",
            "PriorityType": "priority/multifactor",
            "PreemptType": "preempt/qos",
            "PreemptMode": "REQUEUE",
        }
    keys |= options
    lines = [f"{key}={value}" for key, value in keys.items()]
    for node, port in node_ports.items():
        cores, gres = (ACC_CORES, f" Gres=gpu:{GPUS}") if is_acc(node) else (CPU_CORES, "")
        lines.append(
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
            f"Sockets=1 CoresPerSocket={cores} ThreadsPerCore=1 RealMemory=12000{gres}"
        )
    for name in ("cpu", "acc"):
        nodes = ",".join(node for node in node_ports if is_acc(node) == (name == "acc"))
        default = " Default=YES" if name == "cpu" else ""
        lines.append(
            f"PartitionName={name} Nodes={nodes}{default} MaxTime=3-00:00:00 "
            "DefaultTime=00:10:00 State=UP"
        )
    return "\n".join(lines) + "\n"


def is_acc(node: str) -> bool:
    """Whether a node belongs to the partition with GPUs."""
    return node.startswith("acc")


def gres_conf(nodes: Sequence[str]) -> str:
    """Text of gres.conf: without character devices a node is invalid ("count too low")."""
    acc = ",".join(node for node in nodes if is_acc(node))
    return "".join(f"NodeName={acc} Name=gpu File={device}\n" for device in _FAKE_GPUS)


def hosts(nodes: Sequence[str]) -> str:
    """Text of /etc/hosts as jobs see it: every node's name is this machine."""
    lines = Path("/etc/hosts").read_text(encoding="utf-8").splitlines()
    lines += [f"127.0.0.1 {node}" for node in nodes]
    return "\n".join(lines) + "\n"


def slurmdbd_conf(directory: Path, user: str, port: int) -> str:
    """Text of slurmdbd.conf, which must lie beside slurm.conf with mode 600."""
    keys = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={directory}/run/munge.sock",
        "DbdHost": "localhost",
        "DbdAddr": "127.0.0.1",
        "DbdPort": str(port),
        "SlurmUser": user,
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",  # by the socket that MYSQL_UNIX_PORT names
        "StorageUser": "slurm",
        "StoragePass": "slurm",
        "StorageLoc": "slurm_acct_db",
        "LogFile": f"{directory}/log/slurmdbd.log",
        "PidFile": f"{directory}/run/slurmdbd.pid",
        "DebugLevel": "info",
        "CommitDelay": "0",
    }
    return "".join(f"{key}={value}\n" for key, value in keys.items())


# QoS like a site's. `bulk` limits the jobs that one may have queued, `acc_debug` refuses at
# submission what is too long or too many, `preemptor` throws out the jobs of `acc_ehpc`.
QOS_COMMANDS = (
    "add qos acc_ehpc,acc_debug,bulk,preemptor",
    "modify qos acc_debug set MaxWall=02:00:00 MaxSubmitJobsPerUser=4 Flags=DenyOnLimit",
    "modify qos bulk set MaxSubmitJobsPerUser=100",
    "modify qos preemptor set Preempt=acc_ehpc Priority=1000",
    "modify qos acc_ehpc set PreemptMode=requeue GraceTime=12",
    f"add account {ACCOUNT}",
    f"add account {OTHER_ACCOUNT}",
)
ALL_QOS = "acc_ehpc,acc_debug,bulk,preemptor"
