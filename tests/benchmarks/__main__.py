"""`python -m tests.benchmarks [cpu|meta|gpu|cache] [--quick]`, from the pack's folder: figures and their peers."""

import argparse
import importlib
import sys
from pathlib import Path

import pack

pack.register()

from tests.benchmarks import report  # noqa: E402

MODES = ("cpu", "meta", "gpu", "cache")
PLOT = Path(__file__).parents[2] / "docs" / "images" / "step_caches.png"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("mode", choices=MODES, nargs="?", default="cpu", help="what to measure (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small shapes and few repetitions: a check that it runs")
    parser.add_argument("--device", help="for gpu: where to compute (default: cuda; cpu only with --quick)")
    parser.add_argument("--write", action="store_true", help=f"put the table into {report.RESULTS.name}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, for programs")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="for cache: the model (default: the bundled one)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"for cache: draw there (--write: {PLOT.name})")
    options = parser.parse_args(arguments)
    if options.device and options.mode != "gpu":
        parser.error("--device is for the gpu mode")
    if (options.model or options.plot) and options.mode != "cache":
        parser.error("--model and --plot are for the cache mode")
    return options


def main() -> None:
    options = parsed()
    module = importlib.import_module(f".{options.mode}", __package__)
    device = {"meta": "meta", "gpu": options.device or "cuda"}.get(options.mode, "cpu")
    more = {"gpu": (device,), "cache": (options.model, options.plot or (PLOT if options.write else None))}
    try:
        rows = list(module.main(options.quick, *more.get(options.mode, ())))
    except ValueError as problem:
        sys.exit(f"python -m tests.benchmarks {options.mode}: {problem}")
    command = " ".join(["python -m tests.benchmarks", *sys.argv[1:]]).replace(" --write", "")
    text = report.section(options.mode, command, device, rows, getattr(module, "NOTES", ()))
    sys.stdout.write(text)
    if options.write:
        report.write(options.mode, text)
    if options.json:
        options.json.write_text(report.as_json(options.mode, device, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
