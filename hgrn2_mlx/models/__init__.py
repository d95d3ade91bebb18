"""Models with recurrent state, in the shape mlx-lm loads."""

from . import hgrn, hgrn2

# By the model_type of config.json.
ARCHITECTURES = {"hgrn": hgrn, "hgrn2": hgrn2}
