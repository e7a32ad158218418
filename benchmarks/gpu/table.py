"""The tables of a GPU run in Markdown and text.

    python -m benchmarks.gpu.table [RESULTS.json ...]

prints, for each file, the efficiency of whole networks, the training steps and the ceilings; with no argument, of all
that is committed in benchmarks/results/<device>/, as README's GPU table is made. Where nothing has been measured it
says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.gpu.checks import failures
from benchmarks.gpu.results import measured, read

NOT_YET = "Not yet measured on a GPU."


def rows(content: Mapping[str, Any], warmth: str = "cold") -> list[table.Row]:
    """Whole networks; of a case that several stages timed, the row with the most dense engines, the latest of them."""
    found: dict[tuple, table.Row] = {}
    for stage in ("matrix", "peers", "compiled"):
        for finding in content["stages"].get(stage, {}).values():
            if warmth in finding:
                row = table.row_of(finding[warmth])
                key = row.case, row.batch, row.mix
                if key not in found or len(row.dense) >= len(found[key].dense):
                    found[key] = row
    return list(found.values())


def headline(content: Mapping[str, Any]) -> str:
    """The conditions in words."""
    facts = content["conditions"]
    dry = "DRY RUN in the interpreter, no GPU: the figures mean nothing. " if facts["dry_run"] else ""
    device = facts["device"]
    if "multiprocessors" in facts:
        device += (
            f" ({facts['multiprocessors']} multiprocessors, driver {facts['driver']}, CUDA {facts['cuda']}, cuDNN "
            f"{facts['cudnn']})"
        )
    return (
        f"{dry}{device}, torch {facts['torch']}, Triton {facts['triton']}, {facts['date']}. Medians, L2 emptied before "
        "each run, results checked first; DEN with its selector; every engine in a CUDA graph unless it waits for the "
        "GPU; dense is the fastest dense engine that took part in the row."
    )


def markdown(content: Mapping[str, Any]) -> str:
    """Efficiency of whole networks, and the training steps, as Markdown."""
    parts = [headline(content)]
    networks = rows(content)
    for case in dict.fromkeys(row.case for row in networks):
        part = [row for row in networks if row.case == case]
        parts += [f"**{case}, {part[0].dtype}**", table.markdown(table.efficiency_cells(part), left=(1, 3))]
    training = training_cells(content)
    if len(training) > 1:
        parts += ["**Training step**", table.markdown(training, left=(0, 1))]
    if len(parts) == 1:
        parts.append(NOT_YET)
    return "\n\n".join(parts)


def training_cells(content: Mapping[str, Any]) -> list[list[str]]:
    """Of each training step that was timed."""
    cells = [["step", "as", "FLOPs", "dense ms", "DEN ms", "speed-up"]]
    for key, finding in content["stages"].get("training", {}).items():
        for kind in ("as it runs", "in a CUDA graph"):
            part = finding.get(kind, {})
            if "ms" in part:
                figures = (f"{part['dense_ms']:.2f}", f"{part['ms']:.2f}", f"{part['speedup']:.2f}x")
                cells.append([key, kind, f"1/{finding['flop_ratio']:.2f}", *figures])
    return cells


def layer_cells(content: Mapping[str, Any]) -> list[list[str]]:
    """Of each block that was timed, against its dense form."""
    cells = [["block", "FLOPs", "dense ms", "DEN ms", "efficiency", "TFLOP/s", "dense TFLOP/s", "GB/s"]]
    for key, part in content["stages"].get("layers", {}).items():
        if "ms" not in part:
            continue
        ratio = part["flop_ratio"]
        efficiency = f"{part['dense_ms'] / part['ms'] / ratio:.2f}" if ratio else ""
        cells.append(
            [key, f"1/{ratio:.2f}" if ratio else "0", f"{part['dense_ms']:.3f}", f"{part['ms']:.3f}", efficiency,
             f"{part['tflops']:.1f}", f"{part['dense_tflops']:.1f}", f"{part['gbps']:.0f}"]
        )  # fmt: skip
    return cells


def wrong(content: Mapping[str, Any]) -> list[str]:
    """Everything that a run found to be wrong, in words: failed cases, sanitizer reports, results that are off."""
    found = [f"{name}: {how}" for name, how in failures(content["stages"].get("checks", {}).get("cases", {})).items()]
    for key, finding in content["stages"].get("checks", {}).items():
        if key.startswith("sanitizer") and finding.get("status", 0):
            found.append(f"{key}: status {finding['status']}: {finding['tail'][-300:]}")
    for key, finding in _cases(content):
        if finding.get("wrong"):
            found.append(f"{key}: wrong result: {finding['wrong']}")
    return found


def failed(content: Mapping[str, Any]) -> list[str]:
    """The cases that came to no result, and why."""
    return [f"{key}: {finding['failed']}" for key, finding in _cases(content) if "failed" in finding]


def _cases(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What `Context.each` kept, by stage and key."""
    for stage in ("matrix", "training", "compiled", "layers", "peers", "tuning"):
        for key, finding in content["stages"].get(stage, {}).items():
            if isinstance(finding, Mapping):
                yield f"{stage}, {key}", finding


def text(content: Mapping[str, Any]) -> str:
    """The short table that a run prints last."""
    lines = [headline(content), ""]
    lines += [f"{stage}: {status}" for stage, status in content["status"].items()]
    outcomes = content["stages"].get("checks", {}).get("cases", {})
    if outcomes:
        passed = sum(outcome == "passed" for outcome in outcomes.values())
        lines.append(f"kernel tests: {passed} of {len(outcomes)} passed")
    lines += [f"{name}: {rate:.1f}" for name, rate in content["stages"].get("ceilings", {}).items()]
    networks = rows(content)
    if networks:
        lines += ["", *table.aligned(_network_cells(networks))]
    for cells in (training_cells(content), layer_cells(content)):
        if len(cells) > 1:
            lines += ["", *table.aligned(cells)]
    problems = [f"WRONG: {problem}" for problem in wrong(content)]
    problems += [f"FAILED: {problem}" for problem in failed(content)]
    lines += ["", *problems] if problems else []
    return "\n".join(lines)


def _network_cells(networks: Sequence[table.Row]) -> list[list[str]]:
    """The cells of every network in one table."""
    cells: list[list[str]] = []
    for case in dict.fromkeys(row.case for row in networks):
        head, *lines = table.efficiency_cells([row for row in networks if row.case == case])
        cells += [] if cells else [["network", *head]]
        cells += [[case, *line] for line in lines]
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the Markdown of the files, or of what is committed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", help="results.json files (default: the committed ones)")
    paths = parser.parse_args(arguments).results or list(measured().values())
    print("\n\n".join(markdown(read(path)) for path in paths) if paths else NOT_YET)


if __name__ == "__main__":
    main()
