"""Registration only: the values that nerfstudio's commands start from."""
