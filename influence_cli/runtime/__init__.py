"""The machine: terminal, processes, disk, locks, memory, output files.

Start with ``terminal`` and ``outputs``; ``distributed`` is the processes of one job.
Nothing here knows about models or data.
"""
