"""Figures as tables, and the ratios of merino to the best peer."""

import statistics


def median(samples, key):
    return statistics.median(sample[key] for sample in samples)


def summarise(samples):
    """The median of each figure over the repeated runs of one case."""
    return {key: median(samples, key) for key in samples[0]}


def table(headings, rows):
    """Columns aligned: text to the left, figures to the right."""
    cells = [headings] + [[cell if isinstance(cell, str) else number(cell) for cell in row]
                          for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = []
    for index, row in enumerate(cells):
        parts = [row[0].ljust(widths[0])]
        parts += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(parts).rstrip())
        if index == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def number(value):
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"


# key, heading, whether more is better
FIGURES = [
    ("operations_per_second", "ops/s", True),
    ("latency_microseconds_mean", "mean µs", False),
    ("latency_microseconds_p99", "p99 µs", False),
    ("cpu_microseconds_per_operation", "CPU µs/op", False),
    ("operations_per_cpu_second", "ops/CPU s", True),
    ("reader_mebibytes_per_second", "reader MiB/s", True),
    ("cpu_microseconds_per_mebibyte", "CPU µs/MiB", False),
]


def ratio(ours, theirs, more_is_better):
    """How many times better ours is; above 1 is ahead."""
    if not ours or not theirs:
        return None
    return ours / theirs if more_is_better else theirs / ours


def ratios(results):
    """For each of merino's rows and each figure: against the best peer, and for operations per
    second of CPU also against each kind of peer, and the floor, which is none."""
    found = {}
    others = {name: row for name, row in results.items() if not name.startswith("merino")}
    peers = {name: row for name, row in others.items() if name != "floor"}
    for name, row in results.items():
        if not name.startswith("merino") or not peers:
            continue
        against = {}
        for key, _, more in FIGURES:
            values = [peer[key] for peer in peers.values() if peer.get(key)]
            if values and row.get(key):
                best = max(values) if more else min(values)
                against[key] = ratio(row[key], best, more)
        key = "operations_per_cpu_second"
        for kind in ("qemu-nbd", "qsd", "nbdkit", "floor"):
            values = [other[key] for other_name, other in others.items()
                      if other_name.split("/")[0] == kind and other.get(key)]
            if values and row.get(key):
                against[f"{key}_over_{kind}"] = ratio(row[key], max(values), True)
        found[name] = against
    return found


def case_text(title, results):
    """The table of one case, with merino's ratios below."""
    figures = [figure for figure in FIGURES
               if any(figure[0] in row for row in results.values())]
    rows = [[name] + [row.get(key) for key, _, _ in figures] for name, row in results.items()]
    lines = [f"## {title}", table(["server"] + [heading for _, heading, _ in figures], rows)]
    for name, against in ratios(results).items():
        parts = [f"{heading} {against[key]:.2f}×" for key, heading, _ in figures
                 if against.get(key)]
        parts += [f"ops/CPU s over {key.rsplit('_', 1)[1]} {value:.2f}×"
                  for key, value in against.items() if "_over_" in key and value]
        lines.append(f"{name} against the best peer (above 1 is ahead): " + ", ".join(parts))
    return "\n".join(lines)
