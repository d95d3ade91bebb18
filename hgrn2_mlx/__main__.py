"""``python -m hgrn2_mlx`` is the ``hgrn2`` command."""

import sys

from .cli import main

sys.exit(main())
