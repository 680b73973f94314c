"""Everything that takes a device, on one that is not the CPU: the tests of on_device.py, in a process of their own.

The pretended device (pretend.py) is registered with torch for as long as a process lives, and other tests must not see it.
"""

import subprocess
import sys
from pathlib import Path


def test_what_takes_a_device_gives_there_what_it_gives_on_the_cpu():
    file = Path(__file__).with_name("on_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
