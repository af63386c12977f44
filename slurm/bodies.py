"""The shell lines of a chain's jobs, below the `#SBATCH` lines and the site's setup.

A segment starts the ranks of one stage, again and again where that may help, until the stage is
done or its time is up; what to do after each end is decided by `slurm.segment`.
"""

import shlex
from pathlib import Path

from conf.schema import Config
from slurm.render import rank_command, shape, single_command
from slurm.segment import AGAIN, NOTHING_TO_DO
from slurm.verify import DONE

# Ports below the range that Linux hands out by itself (32768 up), ten to a job.
FIRST_PORT, PORT_BLOCKS, PORTS_OF_A_JOB = 15000, 1500, 10


def segment(config: Config, config_path: Path, stage_dir: Path, segment_dir: Path) -> str:
    """Lines of one segment; its exit code is 0 when the stage is done or has saved and stopped."""
    cluster = config.cluster
    if cluster.executor == "local":
        return ""  # the submitting process runs the ranks itself
    places = [str(stage_dir), str(segment_dir)]
    begin = single_command(config, ["slurm.segment", "begin", *places])
    end = single_command(config, ["slurm.segment", "end", *places])
    settings = ["--config", str(config_path)]
    report = ["--report", str(segment_dir / "preflight")]
    train = rank_command(config, ["pipeline.train", *settings], may_stop=True)
    preflight = rank_command(config, ["pipeline.preflight", *settings, *report], may_stop=True)
    done = shlex.quote(str(stage_dir / DONE))
    first = f"{preflight}\n  code=$?" if cluster.preflight else "code=0  # no preflight"
    limit = int(cluster.hours * 3600)
    return f"""\
{master(config)}
# The ranks save and stop {cluster.stop_minutes:g} minutes before the job's end, counted by the
# uptime of this node, which no change of its clock moves.
uptime_seconds() {{ cut -d. -f1 /proc/uptime; }}
left=$(( ${{SLURM_JOB_END_TIME:-0}} - $(date +%s) ))
if [ "$left" -le 0 ] || [ "$left" -gt {limit} ]; then left={limit}; fi
stop_at=$(( $(uptime_seconds) + left - {int(cluster.stop_minutes * 60)} ))

# Slurm's signals go to the ranks, which save and end. This shell only remembers that it was asked
# to end, so as not to start them again.
terminated=
trap 'terminated=--terminated' TERM USR2

attempt=0
while :; do
  attempt=$((attempt + 1))
  export ATTEMPT_ID="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}-$attempt-$(date +%s)"
  block=$(( SLURM_JOB_ID % {PORT_BLOCKS} * {PORTS_OF_A_JOB} ))
  # Another one after a requeue: what was left behind on the node may still hold the old one.
  try=$(( attempt + 3 * ${{SLURM_RESTART_COUNT:-0}} ))
  export MASTER_PORT=$(( {FIRST_PORT} + block + try % {PORTS_OF_A_JOB} ))

  # May and must this segment train? {NOTHING_TO_DO}: the stage is done.
  {begin}
  code=$?
  if [ "$code" -eq {NOTHING_TO_DO} ]; then exit 0; fi
  if [ "$code" -ne 0 ]; then exit "$code"; fi

  {first}
  if [ -n "$terminated" ] && [ "$code" -eq 0 ]; then code=143; fi
  if [ "$code" -eq 0 ]; then
    seconds=$(( stop_at - $(uptime_seconds) ))
    export STOP_AFTER_SECONDS=$(( seconds > 1 ? seconds : 1 ))
    {train}
    code=$?
    # Ranks that were asked to stop return 0, but have not finished.
    if [ "$code" -eq 0 ] && [ ! -e {done} ]; then code=143; fi
  fi

  # Says what comes next. {AGAIN}: the ranks once more, here.
  {end} --code "$code" $terminated
  code=$?
  if [ "$code" -ne {AGAIN} ]; then exit "$code"; fi
done
"""


def verify(config: Config, stage_dir: Path) -> str:
    """Fails unless the stage is done and its checkpoint whole; what follows depends on it."""
    return single_command(config, ["slurm.segment", "verify", str(stage_dir)])


def export(config: Config, stage_dir: Path, out: Path) -> str:
    """The Hugging Face folder of the stage's weights, unless it is there."""
    there = shlex.quote(str(out))
    command = single_command(config, export_words(config, stage_dir, out))
    return f"if [ -e {there} ]; then echo {there} is there already; exit 0; fi\n{command}"


def export_words(config: Config, stage_dir: Path, out: Path) -> list[str]:
    """Module and arguments of the export."""
    places = [f"stage={stage_dir}", f"out={out}", f"tokenizer={config.data.tokenizer}"]
    return ["tools.hf_export", *places]


def master(config: Config) -> str:
    """Lines that find the address at which the ranks meet: this node's, which holds rank 0."""
    if shape(config)[0] == 1:
        return "export MASTER_ADDR=127.0.0.1\n"
    interface = config.cluster.site.master_interface
    lines = ["# Where the ranks meet: this node, as a number, for its name may mean loopback."]
    lines.append("host=${SLURMD_NODENAME:-$(hostname)}")
    if interface is None:
        lines.append("MASTER_ADDR=")
    else:
        lines.append(
            "MASTER_ADDR=$(PATH=$PATH:/usr/sbin:/sbin ip -4 -o address show dev "
            f'{shlex.quote(interface)} | awk \'NR == 1 {{ sub("/.*", "", $4); print $4 }}\')'
        )
    lines.append(_BY_NAME)
    return "\n".join(lines)


_BY_NAME = """\
if [ -z "$MASTER_ADDR" ]; then
  MASTER_ADDR=$(getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }')
fi
case "$MASTER_ADDR" in "" | 127.*)
  address=$(scontrol show node "$host" 2>/dev/null |
    sed -n 's/.*NodeAddr=\\([0-9][0-9.]*\\) .*/\\1/p')
  [ -n "$address" ] || address=$(hostname -I | cut -d ' ' -f 1)
  MASTER_ADDR=${address:-$MASTER_ADDR} ;;
esac
export MASTER_ADDR=${MASTER_ADDR:-$host}
"""
