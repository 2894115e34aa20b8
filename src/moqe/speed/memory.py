"""What stays in memory of a contestant once it has answered: measured in a process of its own, from before it opened
anything of the mixture. Linux only; elsewhere a process does not learn how much of it is resident.

`python -m moqe.speed.memory` is that process: it reads a request as JSON from standard input and prints a number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from moqe.errors import MoqeError

_STATUS = Path("/proc/self/statm")


def resident_bytes() -> int | None:
    """Bytes of this process that are in memory now; None where the system does not say."""
    if not _STATUS.exists():
        return None
    return int(_STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_resident(
    folder: Path, runtime: str | None, work: Path, prompt_tokens: int, new_tokens: int, threads: int, names: list[str]
) -> int | None:
    """Bytes by which a process grows in which the contestants `names` answer one request each.

    Raises MoqeError when that process fails.
    """
    if resident_bytes() is None:
        return None
    asked = [str(folder), runtime, str(work), prompt_tokens, new_tokens, threads, names]
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MoqeError(f"memory of {', '.join(names)} could not be measured: {last[0]}")
    return int(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Answer one request of `measure_resident`."""
    import torch

    from moqe.progress import Silent
    from moqe.speed.contestants import contestants

    folder, runtime, work, prompt_tokens, new_tokens, threads, names = json.load(sys.stdin)
    torch.set_num_threads(threads)
    before = resident_bytes()
    everybody = contestants(Path(folder), runtime, Path(work), prompt_tokens, new_tokens, Silent())
    for contestant in everybody:
        if contestant.name in names:
            contestant.answer(0)
    after = resident_bytes()
    assert before is not None
    assert after is not None
    sys.stdout.write(f"{after - before}\n")


if __name__ == "__main__":
    main()
