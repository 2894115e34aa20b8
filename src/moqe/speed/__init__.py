"""How fast a mixture is, and how much memory it takes: every expert, the router, and the whole, on this machine.

    from moqe.speed import bench

    bench("out/mine").lines

One question a file: who is measured (`contestants`), how long answers take (`timing`), what stays in memory
(`memory`), where it was measured (`machine`), and what it looks like (`page`).
"""

from moqe.speed.run import Bench, Line, bench

__all__ = ["Bench", "Line", "bench"]
