"""The recurrences of HGRN2 and HGRN: a public function each, and the forms behind them."""

from .elementwise_recurrence import elementwise_recurrence
from .gated_recurrence import gated_recurrence

__all__ = ["elementwise_recurrence", "gated_recurrence"]
