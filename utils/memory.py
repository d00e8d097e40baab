"""How much memory this process may still use."""

import os
from pathlib import Path

# Limit and usage of a container: of control groups version 2, and of version 1.
_GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def free_memory() -> int:
    """Bytes that are free on this machine and, in a container, within its limit; 0 if unknown."""
    free = [_available()]
    for limit, used in _GROUP_FILES:
        numbers = [_number(limit), _number(used)]
        if None not in numbers:
            free.append(max(0, numbers[0] - numbers[1]))
    return min(free)


def _available() -> int:
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _number(path: str) -> int | None:
    """None where there is no such file, or no limit ("max")."""
    file = Path(path)
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else None
