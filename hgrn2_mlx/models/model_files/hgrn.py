# The file a converted folder names in config.json under "model_file", so that the
# stock mlx_lm commands run it with --trust-remote-code. Needs `pip install hgrn2-mlx`.
from hgrn2_mlx.models.hgrn import Model, ModelArgs  # noqa: F401
