"""What a run will take, for `check`: the length of its rows, time, memory, disk and downloads of every stage."""
