"""How items reach a model that runs in another process, and how their outcomes come back, whatever carries them."""
