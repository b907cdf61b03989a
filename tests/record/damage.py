"""Change one byte of a file, at a share of its length, and leave its size and its times as they were."""

import os
import sys
from pathlib import Path

path, share = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.6
status, data = path.stat(), bytearray(path.read_bytes())
data[int(share * len(data))] ^= 0x10
path.write_bytes(data)
os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
