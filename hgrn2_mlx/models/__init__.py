"""Models with recurrent state, in the shape mlx-lm loads."""
