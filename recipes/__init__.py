"""One file per recipe, read top to bottom: docstring with its commands, Config, module, run."""
