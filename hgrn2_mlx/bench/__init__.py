"""Speed and memory of a model beside others of its size, measured in the same run.

Each takes its turn with the same numbers of tokens: reading prompts of growing length,
decoding after them, and training steps. Speeds are those of the fastest of a few trials,
so that other work on the machine counts little.
"""

from .comparison import bench
from .models import Size, Subject, random_subject, read_subject
from .picture import draw
from .results import Results
from .settings import Settings

__all__ = [
    "Results",
    "Settings",
    "Size",
    "Subject",
    "bench",
    "draw",
    "random_subject",
    "read_subject",
]
