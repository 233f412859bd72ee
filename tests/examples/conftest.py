"""The examples are scripts beside each other: they are imported as they import themselves, by their folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
