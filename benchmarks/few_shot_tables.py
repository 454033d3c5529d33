"""Blocks of markdown from the records of the few-shot benchmarks, for docs/tables.py."""

from __future__ import annotations

from typing import Any

from benchmarks.few_shot.problems import MAML, REPRESENTATION
from benchmarks.tables import read


def maml_peers() -> str:
    """MAML: milliseconds of a hyperiteration and memory, by the number of episodes; what ours is made of."""
    record = read(MAML)
    pieces = "\n".join(f"| {name} | {_short(ms)} |" for name, ms in record["pieces"].items())
    table = f"{_table(record, 'tasks', 'episodes')}\n\n{_where(record)}"
    return f"{table}\n\n| one episode, hyperax, T = {record['table'][0]['steps']} | ms |\n|---|---|\n{pieces}"


def hyper_representation_peers() -> str:
    """The hyper-representation: milliseconds of a hyperiteration against T."""
    record = read(REPRESENTATION)
    return f"{_table(record, 'steps', 'T')}\n\n{_where(record)}"


def _table(record: dict[str, Any], axis: str, symbol: str) -> str:
    """A row a library, a column for each value of the axis: milliseconds (times hyperax)."""
    every = list(dict.fromkeys(row[axis] for row in record["table"]))
    head = " | ".join(f"{symbol} = {value}" for value in every)
    last = f"{symbol} = {every[-1]}"
    lines = [f"| ms (times hyperax) | {head} | memory, MB, {last} |", f"|---{'|---' * (len(every) + 1)}|"]
    for name in dict.fromkeys(row["row"] for row in record["table"]):
        rows = {row[axis]: row for row in record["table"] if row["row"] == name}
        cells = [_cell(rows.get(value)) for value in every]
        memory = rows.get(every[-1], {}).get("peak_memory_mb", "")
        own = next(iter(rows.values()))["library"] == "hyperax"
        lines.append(f"| {f'**{name}**' if own else name} | {' | '.join(cells)} | {memory} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "seconds" not in row:
        return "gradient differs" if "error" in row else "fails"
    return f"{_short(1000 * row['seconds'])} ({row['times_hyperax']:.2f})"


def _where(record: dict[str, Any]) -> str:
    errors = [row["error"] for row in record["table"] if "seconds" in row]
    double = max(row["float64_error"] for row in record["table"] if "float64_error" in row)
    versions = record["versions"]
    names = ("jax", "torch", "higher", "torchopt", "parallel-metalearn")
    with_versions = ", ".join(f"{name} {versions[name].split('+')[0]}" for name in names)
    return (
        f"{record['data']}, 5-way 1-shot, 15 queries a class, float32, {record['threads']} threads; batch "
        f"normalisation with the statistics of each set. Medians over up to {record['rounds']} rounds in which "
        "all rows take turns. Every gradient is compared with torch.func's in float64 before it is timed: the largest "
        f"relative error is {max(errors):.0e} in float32, and hyperax's in float64 is {double:.0e}. Memory is the "
        f"process's peak, its library included. "
        f"`{record['command']}`, {record['machine']}, commit {record['commit']}; {with_versions}."
    )


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 99.5 else f"{number:.2g}"
