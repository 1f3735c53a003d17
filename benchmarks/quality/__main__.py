"""Run the experiments: ``python -m benchmarks.quality [NAMES] [--seeds 5] [--quick]``, then write docs/results.md.

A run that was stopped goes on. The results are in ``benchmarks/quality/results``: a line of JSON for each training.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import warnings
from pathlib import Path

from benchmarks.quality import page
from benchmarks.quality.experiments import EXPERIMENTS, Experiment
from distill_core.guidance.records import ResultsFolder


def run(name: str, experiment: Experiment, folder: Path, seeds: int, epochs: int) -> None:
    """Make the runs of an experiment that its folder does not have, and print what follows from them."""
    print(f"\n{name}: {experiment.title}", flush=True)
    arguments = experiment.arguments(epochs, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare = importlib.import_module(experiment.package).compare
        comparison = compare(**arguments, metric=experiment.metric, mode=experiment.mode, seeds=seeds, folder=folder)
    print(comparison, flush=True)
    results = ResultsFolder(folder)
    content = results.read() or {}
    if experiment.references is not None and "references" not in content:
        results.write({**content, "references": dict(experiment.references(folder))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; all if left out")
    parser.add_argument("--seeds", type=int, help="number of seeds, instead of each experiment's own")
    parser.add_argument("--quick", action="store_true", help="one epoch with two seeds in a folder that is removed")
    options = parser.parse_args()
    if unknown := set(options.names) - set(EXPERIMENTS):
        parser.error(f"unknown experiments: {', '.join(sorted(unknown))}")
    for name, experiment in EXPERIMENTS.items():
        if options.names and name not in options.names:
            continue
        seeds = options.seeds or experiment.seeds
        if options.quick:
            with tempfile.TemporaryDirectory() as folder:
                run(name, experiment, Path(folder), 2, 1)
        else:
            run(name, experiment, page.RESULTS / name, seeds, experiment.epochs)
    if not options.quick:
        page.write()


if __name__ == "__main__":
    main()
