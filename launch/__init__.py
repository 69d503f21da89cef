"""Launch: the `leyden` command. It starts everything else as a process and never imports torch."""
