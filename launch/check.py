"""`leyden check --static`: read a Slurm script, or what submit would write, and run nothing."""

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
        "usage: leyden check --static SCRIPT.sbatch\n"
        "       leyden check --static RECIPE --cluster FILE.yaml [arguments of submit]\n\n"
        "Reads a batch script, anybody's or the one that submit would write, and says what is\n"
        "known to fail. Exit code 2 if a rule of severity error says something.\n\n"
        f"rules:\n{rules}\n\n"
        "examples:\n"
        "  leyden check --static job.sbatch\n"
        "  leyden check --static pretrain --config 1b --run first --cluster cluster.yaml\n"
    )


def main(arguments: list[str]) -> int:
    """Print the findings; 2 if one is an error."""
    if any(word in ("-h", "--help") for word in arguments):
        print(help_text(), end="")
        return 0
    words = [word for word in arguments if word != "--static"]
    if len(words) == len(arguments) or not words:
        raise ConfigError(
            "leyden check needs --static and a script, or --static and the words of a submit; "
            "leyden check --help shows both"
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
