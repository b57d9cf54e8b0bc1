"""The processes that descend from one, by the titles that Ray gives them."""

from __future__ import annotations

from pathlib import Path


def titles_below(pid: int) -> dict[int, str]:
    """Give pid -> title of all that descend from a process."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while the list was read
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {child: titles[child] for child in sorted(below)}
