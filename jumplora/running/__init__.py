"Several processes, trackers and grids of runs."
