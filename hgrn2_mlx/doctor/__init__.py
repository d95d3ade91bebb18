"""What this machine will run, whether it is right, how fast it is, and what to do if not.

MLX and all that builds on it are imported within the checks: whether they can be is the
first of them. A check that fails in a way nobody thought of is a problem in the report,
and the next one goes on.
"""

from .examination import examine
from .report import Report

__all__ = ["Report", "examine"]
