"""The subcommands of ``hgrn2``, a module each.

A module has ``build_parser``, which gives the command's parser, and ``run``, which
does what its options ask. What only ``run`` needs is imported there if it is slow
to import, so that ``--help`` is quick.
"""
