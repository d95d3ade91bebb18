"""The gated recurrence of HGRN2: one public function and the forms behind it."""

from .gated_recurrence import gated_recurrence

__all__ = ["gated_recurrence"]
