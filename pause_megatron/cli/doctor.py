"""`pause-megatron doctor`: check Python, packages, GPU, compiler, disk, SLURM and network of this machine."""

from __future__ import annotations

import argparse
import json

HELP = "check what this machine has, what works, and what is missing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON list")


def run(args: argparse.Namespace) -> int:
    """Print every finding.

    Args:
        args: Parsed options.

    Returns:
        0 where training can run on this machine, else 1.
    """
    from pause_megatron.cli.support.probes import examine

    marks = {"ok": "ok  ", "missing": "FAIL", "optional": "-   ", "note": "note"}
    findings = []
    for finding in examine():
        findings.append(finding)
        if not args.json:
            print(f"{marks[finding.status]}  {finding.name:20} {finding.text}", flush=True)
            if finding.advice:
                print(f"{'':26} -> {finding.advice}", flush=True)
    failed = [finding.name for finding in findings if finding.status == "missing"]
    if args.json:
        print(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        print(f"\nmissing: {', '.join(failed)}" if failed else "\neverything that training needs is here")
    return 1 if failed else 0
