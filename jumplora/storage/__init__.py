"Records, checkpoints, sparse updates and exports on disk."
