"""Puts the top-level scripts on the import path; --long runs all of tests/test_faults.py, and not a sample of it."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="all kills and full disks of tests/test_faults.py [a sample]")
