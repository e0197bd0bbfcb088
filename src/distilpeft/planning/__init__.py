"""Before anything runs: the plan and its keys, `check` and `init`."""
