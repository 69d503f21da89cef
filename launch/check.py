"""`leyden check`: is this machine, or a cluster, fit to train on? (launch/check_live.py)

`leyden check --static` reads a Slurm script, or what submit would write, and runs nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dist.errors import ConfigError
from launch.lint import RULES, Facts, check_script, script_facts
from launch.slurm import sbatch_text


def help_text() -> str:
    """What `leyden check --help` prints."""
    rules = "\n".join(
        f"  {name}  {severity:<8} {(rule.__doc__ or '').partition(': ')[2].strip()}"
        for name, (severity, rule) in RULES.items()
    )
    return (
        "usage: leyden check [RECIPE|RUN] [--cluster FILE.yaml] [--nodes N] [--nproc N]\n"
        "                    [--disk-mib N] [--json] [--dry-run] [--config NAME] [--key v ...]\n"
        "       leyden check --static SCRIPT.sbatch\n"
        "       leyden check --static RECIPE --cluster FILE.yaml [arguments of submit]\n\n"
        "Measures on every rank, here or by srun on all nodes of the cluster file: devices and\n"
        "versions, a sum that must be right bit for bit, each pair's bandwidth, clocks, disks and\n"
        "shared memory; with --data.url or RUN the dataset and tokenizer as each node sees them;\n"
        "with RECIPE or RUN its planned memory and checkpoints. Exit code 1 if a row says fail;\n"
        "the nodes to blame are then left out of the next submit (FILE.exclude, or the run's\n"
        "control/exclude).\n\n"
        "  --cluster FILE   run on its nodes, one task a device; without it on this machine\n"
        "  --nodes N        instead of the cluster file's\n"
        "  --nproc N        ranks of a node; auto (default): its GPUs, 2 without\n"
        "  --disk-mib N     MiB that each disk is tested with (64)\n"
        "  --json           one JSON object with every pair's speed\n"
        "  --dry-run        print the command and start nothing\n\n"
        "--static reads a batch script, anybody's or the one that submit would write, and says\n"
        "what is known to fail. Exit code 2 if a rule of severity error says something.\n\n"
        f"rules:\n{rules}\n\n"
        "examples:\n"
        "  leyden check\n"
        "  leyden check --cluster cluster.yaml --nodes 4\n"
        "  leyden check pretrain --config 1b --data.url /shared/data --cluster cluster.yaml\n"
        "  leyden check --static job.sbatch\n"
        "  leyden check --static pretrain --config 1b --run first --cluster cluster.yaml\n"
    )


def main(arguments: list[str]) -> int:
    """Print the findings; 2 if one is an error."""
    if any(word in ("-h", "--help") for word in arguments):
        print(help_text(), end="")
        return 0
    words = [word for word in arguments if word != "--static"]
    if len(words) == len(arguments):
        from launch.check_live import check

        return check(arguments, Path.cwd())
    if not words:
        raise ConfigError(
            "--static needs a script, or the words of a submit; leyden check --help shows both"
        )
    if len(words) == 1:
        try:
            text = Path(words[0]).read_text()
        except UnicodeDecodeError:
            raise ConfigError(f"{words[0]} is not a text file") from None
        findings = check_script(text, Facts())
    else:
        from launch.submit import make_plan

        plan = make_plan(words, Path.cwd())
        text = sbatch_text(plan.request, plan.cluster)
        findings = check_script(text, script_facts(plan.request, plan.cluster, plan.code))
    for finding in findings:
        print(finding.line())
    errors = sum(finding.severity == "error" for finding in findings)
    print(f"{len(RULES)} rules: {errors} errors, {len(findings) - errors} warnings")
    return 2 if errors else 0


if __name__ == "__main__":
    from dist.errors import run_main

    run_main(lambda: main(sys.argv[1:]))
