"""How jobs and their processes are started and watched."""
