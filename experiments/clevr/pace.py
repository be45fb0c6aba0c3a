"""Processor seconds of a training step, once its program is compiled.

    python experiments/clevr/pace.py msdspn train clevr FLAGS

Runs the command until its last step and prints the number; to score the model is not waited for.
The command says its step every 15 seconds; the processor time of the process is read at those
lines, and the slope from the second to the last is taken.
"""

import os
import re
import subprocess
import sys
from pathlib import Path


def processor_seconds(pid):
    """User and system time of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pace(command):
    """Processor seconds of one step of a training."""
    seen = []
    with subprocess.Popen(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            sys.stderr.write(line)
            if step := re.match(r"step (\d+)/(\d+) ", line):
                seen.append((int(step[1]), processor_seconds(process.pid)))
                if step[1] == step[2]:
                    process.kill()
                    break
        else:
            raise SystemExit(process.wait() or "pace: expected a training that takes all its steps")
    if len(seen) < 3:
        raise SystemExit("pace: expected a training of several lines of steps; take more steps")
    (first, start), (last, end) = seen[1], seen[-1]
    return (end - start) / (last - first)


if __name__ == "__main__":
    print(pace(sys.argv[1:]))
